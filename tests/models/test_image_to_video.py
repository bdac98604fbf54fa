"""Pipelines that animate an image: quantized by recipes that do not calibrate; linears that only they have."""

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import s2q
from s2q.checkpoint import file_tensors, read_config
from s2q.cli import run
from s2q.common.errors import InvalidInputError
from s2q.models import block_linears, family_of
from s2q.nn import PackedLinear
from s2q.planning import plan
from tiny import tiny_pipeline

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


def test_calibration_is_refused(model, tmp_path):
    name = type(DiffusionPipeline.from_pretrained(model)).__name__
    overrides = ["calibration.samples=3", "calibration.steps=2", "distillation.epochs=1"]
    with pytest.raises(
        InvalidInputError, match=rf"^{name}: calibration generates from prompts only.*without calibration"
    ):
        s2q.quantize(model, recipe="s2q-w4a6", out=tmp_path / "out", prompts=["red"], overrides=overrides)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_commands_that_generate_refuse_it_before_any_step(model, tmp_path, capsys, monkeypatch, command):
    pipeline = type(DiffusionPipeline.from_pretrained(model))
    monkeypatch.setattr(pipeline, "__call__", lambda *_args, **_arguments: pytest.fail("it was called"))
    (tmp_path / "prompts.txt").write_text("a square\n")
    options = {"generate": ["-o", tmp_path / "out"], "eval": ["--reference", model, "-o", tmp_path / "out.json"]}
    arguments = [command, "-m", model, *options[command], "--prompts", tmp_path / "prompts.txt", "--device", "cpu"]
    assert run([str(argument) for argument in arguments]) == 3
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert line.startswith(f"error: {pipeline.__name__}: s2q generates from prompts only, with ")
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


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
