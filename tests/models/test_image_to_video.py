"""Pipelines that animate an image: quantized with and without calibration, evaluated; linears that only they have."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import s2q
from s2q.calibration.candidates import prepare
from s2q.calibration.teacher import load_teacher
from s2q.checkpoint import file_tensors, read_config
from s2q.cli import run
from s2q.common.errors import InvalidInputError, ResourceError
from s2q.comparison.compare import compare
from s2q.evaluation.measure import run_reference
from s2q.evaluation.settings import EvaluationSettings
from s2q.generation import conditioning
from s2q.generation.conditioning import starting_image
from s2q.generation.generate import generate
from s2q.generation.prompts import VIDEOS, Prompt, prompt_list, prompt_record, read_prompts
from s2q.generation.settings import resolve_settings
from s2q.generation.trajectory import record_trajectory
from s2q.models import block_linears, family_of, resolve_model
from s2q.nn import PackedLinear
from s2q.planning import plan
from s2q.recipes.load import load_recipe
from s2q.report.video import encode_mp4
from s2q.shapes import embedded
from tiny import image_prompts, prompts_for, tiny_pipeline, video_size, video_to_video
from tiny_families import IMAGE_TO_VIDEO

QUICK = ("cogvideox image", "wan image")
EACH = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in IMAGE_TO_VIDEO]
CALL = {"num_frames": 9, "height": 16, "width": 16, "num_inference_steps": 2}


def picture(colour):
    """A square of one colour in a corner of a black image."""
    image = Image.new("RGB", (16, 16))
    image.paste(colour, (0, 0, 8, 8))
    return image


def generated(pipe, colour="red", output_type="latent"):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(picture(colour), "a square", **CALL, generator=generator, output_type=output_type).frames


@pytest.fixture(scope="module", params=["cogvideox", "wan"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline(f"{request.param} image").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("overrides", [[], ["outer.num_bits=8"]], ids=["blocks", "outer"])
def test_from_plan_to_video(model, tmp_path, overrides):
    original = DiffusionPipeline.from_pretrained(model)
    planned = plan(str(model), recipe="rtn-w4a6", overrides=overrides)
    s2q.quantize(model, recipe="rtn-w4a6", out=tmp_path / "out", overrides=overrides)
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(loaded) is type(original)
    packed = {name for name, one in loaded.transformer.named_modules() if isinstance(one, PackedLinear)}
    assert packed == set(read_config(tmp_path / "out").layers) == {layer.name for layer in planned.layers}
    state = file_tensors(loaded.transformer).values()
    assert sum(tensor.numel() * tensor.element_size() for tensor in state) == planned.storage["quantized_bytes"]
    frames = generated(loaded, output_type="pt")
    assert frames.shape == (1, 9, 3, 16, 16)
    assert bool(frames.isfinite().all())
    expected, found = generated(original), generated(loaded)
    error = float((found - expected).norm() / expected.norm())
    assert 0 < error < 0.1
    assert not torch.equal(generated(loaded, "blue"), found)


SEEDS = {"sana-video image": 1}
"""With others, denominators of its linear attention vanish for some tokens, which random weights allow."""
CALIBRATION = ["n_prompts=2", "samples=2", "steps=3"]
FEW = [*(f"calibration.{text}" for text in CALIBRATION), "distillation.epochs=1"]
OVERRIDES = [*FEW, "calibration.num_frames=9"]


def size_of(pipe):
    size = video_size(pipe)
    return [f"calibration.{name}={value}" for name, value in size.items()], size


def file_of(folder, *texts, pipe=None):
    """A prompt file with an image per prompt beside it, and the videos that the pipeline needs."""
    lines = []
    for index, prompt in enumerate(image_prompts(*texts, pipe=pipe)):
        prompt["image"].save(folder / f"{index}.png")
        for name in prompt.keys() & set(VIDEOS):
            (folder / f"{index}-{name}.mp4").write_bytes(
                encode_mp4(np.stack([np.array(frame) for frame in prompt[name]]))
            )
            prompt[name] = f"{index}-{name}.mp4"
        lines.append(json.dumps(prompt | {"image": f"{index}.png"}))
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("name", EACH)
def test_the_image_decides_the_video_and_what_is_recorded(name):
    pipe = tiny_pipeline(name, num_layers=2)
    settings = resolve_settings(pipe, requested={"num_inference_steps": 3, **video_size(pipe)})
    prompts = prompts_for(pipe, "a", "a")
    prompts.append(prompts[0])
    red, blue, again = (record_trajectory(pipe, [prompt], seeds=[0], settings=settings) for prompt in prompts)
    assert torch.equal(red.latents, again.latents)
    assert not torch.equal(red.latents, blue.latents)
    assert not torch.equal(red.calls[0].output, blue.calls[0].output)
    assert [call.timestep for call in red.calls] == pytest.approx(pipe.scheduler.timesteps.tolist())
    videos = generate(pipe, prompts=prompts[:2], **settings.to_dict(), batch_size=4)
    assert [
        torch.equal(video.latents, expected.latents[0]) for video, expected in zip(videos, (red, blue), strict=True)
    ] == [
        True,
        True,
    ]


@pytest.mark.parametrize("name", EACH)
def test_from_images_to_an_evaluated_checkpoint(name, tmp_path, no_encoding):
    pipe = tiny_pipeline(name, seed=SEEDS.get(name, 0))
    overrides, size = size_of(pipe)
    pipe.save_pretrained(tmp_path / "model")
    prompts = read_prompts(file_of(tmp_path, "a red one", "a blue one", pipe=pipe))
    report = s2q.quantize(
        tmp_path / "model", recipe="s2q-w4a6", out=tmp_path / "out", prompts=prompts, overrides=[*FEW, *overrides]
    )
    assert report.n_prompts == 2
    selection = json.loads((tmp_path / "out/s2q/selection.json").read_text())
    assert selection["prompts"] == [prompt_record(prompt) for prompt in prompts]
    loaded = s2q.load(tmp_path / "out")
    assert type(loaded) is type(pipe)
    call = {"num_inference_steps": 2, **size}
    (video,) = generate(loaded, prompts=prompts[:1], **call)
    assert video.frames.shape == (size["num_frames"], size["height"], size["width"], 3)
    result = s2q.evaluate(tmp_path / "out", reference=tmp_path / "model", prompts=prompts, seeds=[0], **call)
    assert 0 < result["metrics"]["velocity_relative_error"]["mean"] < 0.2
    assert [entry["prompt"] for entry in result["videos"]] == ["a red one", "a blue one"]
    assert result["inputs"] == [prompt_record(prompt) for prompt in prompts]
    measured = result["videos"][0]["metrics"]
    if name == "wan-animate image":  # whose first frame is another than the image
        assert measured["first_frame_psnr_db"] is None
        return
    pixels = np.array(loaded.video_processor.resize(prompts[0].image.pixels, size["height"], size["width"]))
    error = np.square(video.frames[0].numpy().astype(float) - pixels).mean()
    if name != "hunyuanvideo 1.5 image":  # which crops
        assert measured["first_frame_psnr_db"] == pytest.approx(10 * np.log10(255**2 / error), abs=0.2)
    is_fixed = measured["first_frame_psnr_db"] == measured["reference_first_frame_psnr_db"]
    fixed = ("ltx-2 image", "sana-video image", "wan 2.2 5b image")
    assert is_fixed == (name in fixed), "the first latent frame is that of the image"


@pytest.mark.parametrize("name", [name for name in IMAGE_TO_VIDEO if name != "wan-animate image"])
def test_the_first_frame_is_compared_with_the_image_that_the_pipeline_encodes(name, monkeypatch):
    pipe, seen = tiny_pipeline(name), []
    preprocess = pipe.video_processor.preprocess

    def spy(*args, **kwargs):
        seen.append(preprocess(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(pipe.video_processor, "preprocess", spy)
    size = video_size(pipe)
    prompts = prompt_list("prompts", image_prompts("a"))
    run = run_reference(
        pipe,
        prompts=prompts,
        seeds=[0],
        settings=EvaluationSettings(requested={"num_inference_steps": 2, **size}, metrics=("first_frame_psnr_db",)),
    )
    encoded = ((seen[0][0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    image = run.images[prompts[0]]
    if name == "ltx-2 image":  # which compresses it first
        assert 0 < float((image.float() - encoded.float()).abs().mean()) < 5
    else:
        assert torch.equal(image, encoded)
    assert len(image.unique()) > 2, "an image that was resized"
    assert starting_image(pipe, "text alone", height=16, width=16) is None


@pytest.mark.slow
def test_a_plan_counts_the_tokens_of_the_image_and_measures_with_one(model, capsys):
    pipe = DiffusionPipeline.from_pretrained(model)
    has_tokens = getattr(pipe.transformer.config, "image_dim", None) is not None
    planned = plan(str(model), recipe="s2q-w4a6", overrides=size_of(pipe)[0])
    assert planned.calibration.image_tokens == (257 if has_tokens else 0)
    assert planned.calibration.step_bytes > 0
    overrides = [argument for text in [*FEW, *size_of(pipe)[0]] for argument in ("--set", text)]
    assert run(["plan", "-m", str(model), "-r", "s2q-w4a6", "--measure", "--device", "cpu", *overrides]) == 0
    assert (", 257 image and 512 text tokens" in capsys.readouterr().out) == has_tokens


def test_a_prompt_without_an_image_is_refused_before_any_step(model, tmp_path, monkeypatch, capsys):
    pipeline = type(DiffusionPipeline.from_pretrained(model))
    monkeypatch.setattr(pipeline, "__call__", lambda *_args, **_arguments: pytest.fail("it was called"))
    (tmp_path / "prompts.txt").write_text("a square\n")
    commands = {
        "generate": ["-o", tmp_path / "out"],
        "eval": ["--reference", model, "-o", tmp_path / "out.json"],
        "quantize": ["-r", "s2q-w4a6", "-o", tmp_path / "out", "--set", "calibration.samples=3"],
    }
    size = ["--height", 16, "--width", 16, "--num-frames", 9]
    for command, options in commands.items():
        arguments = [command, "-m", model, *options, *size, "--prompts", tmp_path / "prompts.txt", "--device", "cpu"]
        assert run([str(argument) for argument in arguments]) == 3, command
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        expected = f"error: prompt 1 of 1: has no image; {pipeline.__name__} needs an image per prompt: a .jsonl file"
        assert line.startswith(expected), command
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


@pytest.mark.slow
def test_a_comparison_takes_images(model, tmp_path, no_encoding, forked_workers):
    prompts = read_prompts(file_of(tmp_path, "a red one"))
    options = {"model": model, "out": tmp_path / "out", "seeds": [0], **CALL}
    result = compare(["rtn-w8a8"], prompts=prompts, **options)
    assert result["entries"][0]["error"] is None
    assert result["prompts"] == ["a red one"]
    assert result["inputs"] == [prompt_record(prompts[0])]
    evaluation = json.loads((tmp_path / "out" / result["entries"][0]["evaluation"]).read_text())
    assert evaluation["inputs"] == result["inputs"]
    other = [Prompt("a red one", image=prompt_list("prompts", image_prompts("a", "b"))[1].image)]
    with pytest.raises(InvalidInputError, match="contains a different comparison: prompts"):
        compare(["rtn-w8a8"], prompts=other, **options)


def test_a_pipeline_that_needs_something_else_is_refused(tmp_path):
    pipe, classes = video_to_video(), "CogVideoXPipeline or CogVideoXImageToVideoPipeline only"
    with pytest.raises(InvalidInputError, match=f"^CogVideoXVideoToVideoPipeline: .* with {classes}"):
        generate(pipe, prompts=["a"])
    with pytest.raises(InvalidInputError, match=f"^CogVideoXVideoToVideoPipeline: .* with {classes}"):
        s2q.quantize(pipe, recipe="s2q-w4a6", out=tmp_path / "out", prompts=["a"], overrides=OVERRIDES)


def test_a_package_that_the_call_needs_is_named_before_any_step(tmp_path, monkeypatch):
    pipe = tiny_pipeline("ltx-2 image")
    monkeypatch.setattr(conditioning, "is_installed", lambda package: package != "av")
    expected = "^LTX2ImageToVideoPipeline: its call needs av, not installed; pip install av$"
    with pytest.raises(ResourceError, match=expected):
        generate(pipe, prompts=image_prompts("a"))
    with pytest.raises(ResourceError, match=expected):
        s2q.quantize(pipe, recipe="s2q-w4a6", out=tmp_path / "out", prompts=image_prompts("a"), overrides=OVERRIDES)


def test_another_image_is_recorded_again(model, tmp_path):
    recipe = load_recipe("s2q-w4a6", overrides=[*OVERRIDES, "calibration.height=16", "calibration.width=16"])
    teacher, group = load_teacher(resolve_model(model), recipe, dtype=torch.float32, device="cpu"), recipe.calibration
    first, second = (prompt_list("prompts", image_prompts("a", "b")[::step]) for step in (1, -1))
    swapped = [Prompt("a", image=second[0].image), Prompt("b", image=second[1].image)]
    inputs = [prepare(teacher, prompts, group, seed=0, inputs={}) for prompts in (first, swapped)]
    assert inputs[0].fingerprint == inputs[1].fingerprint
    assert inputs[0].prompt_fingerprint(0) != inputs[1].prompt_fingerprint(0)


def test_hunyuanvideo_15_makes_the_sizes_of_its_target_alone():
    pipe = tiny_pipeline("hunyuanvideo 1.5 image")
    assert (resolve_settings(pipe).height, resolve_settings(pipe).width) == (48, 80)
    with pytest.raises(InvalidInputError, match=r"height, width: got 64 and 80; .* makes \d+ x \d+ of this aspect"):
        resolve_settings(pipe, requested={"height": 64, "width": 80})


def test_linears_of_a_group_read_the_same_tensor_and_those_of_two_do_not(model):
    pipe = DiffusionPipeline.from_pretrained(model)
    family, heard = family_of(pipe.transformer), {}
    block = pipe.transformer.get_submodule(f"{family.block_lists[0]}.1")
    for name, module in block.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _module, args, name=name: heard.update({name: args[0]}))
    generated(pipe)
    listed = block_linears(pipe.transformer, family)
    readers = {}
    for name in {linear.name.split(".", 2)[2] for linear in listed if linear.role == "linear"}:
        readers.setdefault(id(heard[name]), set()).add(name)
    shared = {frozenset(names) for names in readers.values() if len(names) > 1}
    assert shared == {frozenset(names) for names in family.shared_inputs}


def test_wan_has_linears_for_the_tokens_of_an_image_in_its_cross_attention_alone():
    transformer = tiny_pipeline("wan image").transformer
    listed = [one.name for one in block_linears(transformer, family_of(transformer))]
    found = [name for name in listed if "add_" in name]
    assert found == [f"blocks.{block}.attn2.add_{kind}_proj" for block in range(2) for kind in "kv"]
    assert len(listed) == 2 * 12


@pytest.mark.slow
def test_the_embedded_model_needs_no_image_for_captions(tmp_path, monkeypatch, no_encoding, capsys):
    folder, caption = tmp_path / "model", "a red circle moving left on a grey background"
    tiny_pipeline("wan image").save_pretrained(folder)
    (folder / "generation.json").write_text(json.dumps(CALL | {"guidance_scale": 2.0}))
    monkeypatch.setattr(embedded, "embedded_folder", lambda _name: folder)
    few, name = ["--num-prompts", "2", "--seeds", "1", "--device", "cpu"], "shapes-wan-i2v"
    overrides = [argument for text in OVERRIDES for argument in ("--set", text)]
    out = ["-o", str(tmp_path / "out")]
    assert run(["quantize", "-m", name, "-r", "s2q-w4a6", *out, "--device", "cpu", *overrides]) == 0
    selection = json.loads((tmp_path / "out/s2q/selection.json").read_text())
    assert all(set(prompt) == {"prompt", "image"} for prompt in selection["prompts"])
    for model in (name, str(tmp_path / "out")):
        options = ["-m", model, "-o", str(tmp_path / "videos"), "--overwrite", "--device", "cpu"]
        assert run(["generate", *options, "--prompt", caption]) == 0
        assert "image" in json.loads((tmp_path / "videos/generation.json").read_text())["videos"][0]
        assert run(["generate", *options, "--prompt", "a cat"]) == 3
        assert "has no image" in capsys.readouterr().err
    assert run(["eval", "-m", str(tmp_path / "out"), "--reference", name, "-o", str(tmp_path / "eval.json"), *few]) == 0
    metrics = json.loads((tmp_path / "eval.json").read_text())["metrics"]
    assert metrics["first_frame_psnr_db"]["mean"] is not None
    assert metrics["adherence_all"]["mean"] is not None
    assert run(["compare", "rtn-w8a8", "-m", name, "-o", str(tmp_path / "compared"), *few]) == 0
    assert "| first frame |" in (tmp_path / "compared/compare.md").read_text()
