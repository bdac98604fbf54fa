"""MiniMax-H3, which diffusers has as a modular pipeline only: loading, saving, running and quantizing it."""

import json
import shutil

import pytest
import torch
from diffusers import MiniMaxH3Blocks, MiniMaxH3ModularPipeline, ModularPipeline
from diffusers.models.modeling_utils import get_parameter_dtype

import s2q
from s2q.calibration.artefacts import Argument
from s2q.common.errors import InvalidInputError, UsageError
from s2q.core.tokens import TokenGrid, TokenLayout
from s2q.generation.settings import latent_frames, resolve_settings, video_tokens, within_tokens
from s2q.generation.trajectory import record_trajectory
from s2q.models import resolve_model
from s2q.nn import PackedLinear
from s2q.pipelines import MODULAR_INDEX, find_index, pinned_index, read_index
from s2q.pipelines.minimax_h3 import MiniMaxH3Pipeline, TextProcessor
from s2q.planning import plan
from tiny import tiny_pipeline

SIZE = {"num_frames": 124, "height": 32, "width": 32}
PARTS = ("transformer", "vae", "audio_vae", "scheduler", "audio_scheduler", "text_encoder", "tokenizer")
CLASS = "MiniMaxH3ModularPipeline"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder as diffusers saves one, whose index names it, with a second transformer and a processor."""
    folder = tmp_path_factory.mktemp("h3") / "model"
    modular = MiniMaxH3ModularPipeline(blocks=MiniMaxH3Blocks())
    modular.update_components(**tiny_pipeline("minimax-h3", dtype=torch.bfloat16).components)
    modular.save_pretrained(str(folder), overwrite_modular_index=True)
    index = json.loads((folder / MODULAR_INDEX).read_text())
    for name in ("transformer_ref", "processor"):
        index[name][2] |= {"pretrained_model_name_or_path": "acme/h3", "subfolder": name}
    (folder / MODULAR_INDEX).write_text(json.dumps(index))
    shutil.copytree(folder / "transformer", folder / "transformer_ref")
    (folder / "processor").mkdir()
    for name in ("processor_config.json", "chat_template.jinja", "processing_evil.py"):
        (folder / "processor" / name).write_text("{}")
    (folder / "secret.json").write_text("{}")
    (folder / "processor" / "inside.json").symlink_to(folder / "secret.json")
    (tmp_path_factory.getbasetemp() / "secret.json").write_text("{}")
    (folder / "processor" / "outside.json").symlink_to(tmp_path_factory.getbasetemp() / "secret.json")
    return folder


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "w4a6"
    s2q.quantize(model, recipe="rtn-w4a6", out=out)
    return out


def videos(pipe, **call):
    return pipe(prompt="red", **SIZE, generator=torch.Generator().manual_seed(0), output_type="pt", **call)


def by_diffusers(folder):
    """The modular pipeline as its users load it, with a processor that needs no torchvision."""
    pipe = ModularPipeline.from_pretrained(str(folder))
    pipe.load_components(names=list(PARTS), dtype=torch.bfloat16)
    pipe.update_components(processor=TextProcessor())
    return pipe


def test_the_index_has_what_text_to_video_needs(model):
    source, given = resolve_model(model), json.loads((model / MODULAR_INDEX).read_text())
    assert given["transformer_ref"][2]["type_hint"] == ["diffusers", "MiniMaxH3Transformer3DModel"]
    assert given["reference_image_short_edge"] == 2048, "which other workflows read"
    assert find_index(model).name == MODULAR_INDEX
    assert source.component_classes.keys() == set(PARTS)
    assert source.component_classes["transformer"] == ("diffusers", "MiniMaxH3Transformer3DModel")
    assert source.pipeline_type() is MiniMaxH3Pipeline
    assert read_index(model, remedy="")["canvas_short_edge"] == 768


@pytest.mark.parametrize("packed", [False, True], ids=["full precision", "checkpoint"])
def test_a_call_makes_what_the_modular_pipeline_of_diffusers_makes(model, checkpoint, packed):
    folder = checkpoint if packed else model
    ours = videos(s2q.load(folder), num_inference_steps=2)
    theirs = by_diffusers(folder)
    assert isinstance(theirs.transformer.transformer_blocks[0].attn.to_q, PackedLinear) == packed
    found = theirs(
        prompt="red",
        **SIZE,
        num_inference_steps=3,  # points of the schedule
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        output=["videos", "audio"],
    )
    assert torch.equal(ours.frames, found["videos"])
    assert torch.equal(ours.audio, found["audio"])


def test_a_checkpoint_has_what_the_modular_pipeline_needs_and_loads_anywhere(model, checkpoint):
    assert sorted(path.name for path in checkpoint.iterdir() if path.is_dir()) == sorted([*PARTS, "processor", "s2q"])
    copied = {path.name for path in (checkpoint / "processor").iterdir()}
    assert copied == {"processor_config.json", "chat_template.jinja", "inside.json"}, "no code, nothing from outside"
    index = json.loads((checkpoint / MODULAR_INDEX).read_text())
    assert (index["_class_name"], index["_blocks_class_name"]) == (CLASS, "MiniMaxH3Blocks")
    assert index["reference_image_short_edge"] == 2048
    assert index["transformer"][:2] == ["diffusers", "MiniMaxH3Transformer3DModel"]
    assert {index[name][2]["pretrained_model_name_or_path"] for name in (*PARTS, "processor")} == {None}
    specs = ModularPipeline.from_pretrained(str(checkpoint))._component_specs
    found = {name for name, spec in specs.items() if spec.pretrained_model_name_or_path == str(checkpoint)}
    assert found == {*PARTS, "processor"}
    card = (checkpoint / "README.md").read_text()
    assert 'pipe = ModularPipeline.from_pretrained("path/to/this/folder")\npipe.load_components(dtype=' in card
    assert not s2q.inspect(checkpoint, verify=True).problems


@pytest.mark.parametrize("revision", [None, "v2"])
def test_a_pushed_index_names_the_repository_and_the_branch(checkpoint, revision):
    index = json.loads(pinned_index((checkpoint / MODULAR_INDEX).read_bytes(), "acme/h3-w4a6", revision=revision))
    for name in (*PARTS, "processor"):
        location = {key: index[name][2][key] for key in ("pretrained_model_name_or_path", "subfolder", "revision")}
        assert list(location.values()) == ["acme/h3-w4a6", name, revision]


def edited(model, folder, **entries):
    """A copy of a model with other entries in its index; None removes one."""
    shutil.copytree(model, folder, symlinks=True)
    index = json.loads((folder / MODULAR_INDEX).read_text()) | entries
    (folder / MODULAR_INDEX).write_text(json.dumps({name: value for name, value in index.items() if value is not None}))
    return folder


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"audio_vae": None}, "modular_model_index.json: has no audio_vae, or not its class"),
        ({"audio_vae": [None, None]}, "modular_model_index.json: has no audio_vae, or not its class"),
        ({"vae": [None, None, {"type_hint": 5}]}, "modular_model_index.json: has no vae, or not its class"),
        (
            {"vae": ["diffusers", "AutoencoderKLMiniMaxH3", {"subfolder": "vae2"}]},
            "vae is in 'vae2'; expected a folder of its name",
        ),
        ({"vae": ["os", "system", {}]}, "expected a class of diffusers or transformers"),
        (
            {"_class_name": "WanModularPipeline"},
            f"'WanModularPipeline' is a modular.*s2q does not run; expected {CLASS}",
        ),
    ],
)
def test_an_index_that_does_not_fit_is_refused_at_once(model, tmp_path, entries, message):
    with pytest.raises(InvalidInputError, match=message):
        plan(edited(model, tmp_path / "copy", **entries), recipe="rtn-w4a6")


def test_a_missing_component_is_named_and_not_looked_up_elsewhere(model, tmp_path, monkeypatch):
    folder = edited(model, tmp_path / "copy")
    shutil.rmtree(folder / "audio_vae")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInputError, match="copy/audio_vae is missing, which the pipeline needs"):
        s2q.load("copy")


def test_an_export_has_what_the_modular_pipeline_needs(checkpoint, tmp_path):
    report = s2q.export(checkpoint, to="diffusers", out=tmp_path / "plain")
    assert report.loading == "ModularPipeline.from_pretrained(OUT) and its load_components()"
    pipe = by_diffusers(tmp_path / "plain")
    assert type(pipe.transformer.transformer_blocks[0].attn.to_q) is torch.nn.Linear
    assert pipe._component_specs.keys() >= {"processor"}
    assert (tmp_path / "plain" / "processor" / "processor_config.json").is_file()
    expected = videos(s2q.load(checkpoint), num_inference_steps=1).frames
    found = videos(s2q.load(tmp_path / "plain"), num_inference_steps=1).frames
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)


def test_dtypes_are_those_of_full_precision(checkpoint):
    """The transformer asks its linears for their dtype and converts to it."""
    transformer = s2q.load(checkpoint).transformer
    assert get_parameter_dtype(transformer.transformer_blocks[0].adaln_proj.linear) == torch.bfloat16
    seen = []
    transformer.transformer_blocks[1].register_forward_pre_hook(lambda _module, args: seen.append(args[0].dtype))
    pipe = s2q.load(checkpoint)
    pipe.register_modules(transformer=transformer)
    videos(pipe, num_inference_steps=1)
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_frames": 107}, "num_frames: got 107; MiniMaxH3Pipeline makes 124 to 345 frames"),
        ({"num_frames": 362}, "num_frames: got 362; MiniMaxH3Pipeline makes 124 to 345 frames"),
        ({"num_frames": 125}, r"num_frames: got 125; this VAE decodes 17 n \+ 5 frames: use 124 or 141"),
        ({"height": 40}, "height: got 40; VAE and transformer take multiples of 32 pixels: use 32 or 64"),
        ({"guidance_scale": 2.0}, "guidance_scale: got 2; MiniMaxH3Pipeline has no guidance"),
        ({"negative_prompt": "ugly"}, "negative_prompt: got 'ugly'; guidance is distilled into the transformer"),
        ({"scheduler": "UniPCMultistepScheduler"}, "does not fit MiniMaxH3Pipeline.*use MiniMaxH3Scheduler"),
    ],
)
def test_what_it_cannot_run_is_refused(asked, message):
    with pytest.raises(InvalidInputError, match=message):
        resolve_settings(tiny_pipeline("minimax-h3"), requested=SIZE | asked)


def test_its_own_call_refuses_guidance_and_long_prompts():
    pipe = tiny_pipeline("minimax-h3")
    with pytest.raises(InvalidInputError, match="guidance is distilled into MiniMax-H3, use 1"):
        videos(pipe, guidance_scale=3.0)
    with pytest.raises(InvalidInputError, match="prompt: has 4 tokens, more than max_sequence_length=3; shorten it"):
        videos(pipe, max_sequence_length=3)


def test_what_the_class_does_not_do_is_refused(checkpoint, tmp_path):
    with pytest.raises(UsageError, match=f"use s2q.load.FOLDER., or {CLASS} of diffusers"):
        MiniMaxH3Pipeline.from_pretrained(checkpoint)
    with pytest.raises(UsageError, match="push_to_hub is not possible; save it, and use s2q push"):
        tiny_pipeline("minimax-h3").save_pretrained(tmp_path / "out", push_to_hub=True)


@pytest.mark.parametrize("output_type", ["pt", "latent"])
def test_a_call_frees_what_offloading_left_on_the_device(output_type, monkeypatch):
    pipe, freed = tiny_pipeline("minimax-h3"), []
    monkeypatch.setattr(MiniMaxH3Pipeline, "maybe_free_model_hooks", lambda self: freed.append(self))
    pipe(prompt="red", **SIZE, num_inference_steps=1, output_type=output_type)
    assert freed == [pipe]


def test_a_modular_pipeline_of_diffusers_itself_is_refused(model, tmp_path):
    pipe = by_diffusers(model)
    with pytest.raises(InvalidInputError, match=f"model: got a {CLASS}, a list of steps; pass the folder or the Hub"):
        s2q.quantize(pipe, recipe="rtn-w4a6", out=tmp_path / "out")


def test_groups_of_frames():
    pipe = tiny_pipeline("minimax-h3")
    settings = resolve_settings(pipe, requested=SIZE | {"num_frames": 345, "height": 64})
    assert (latent_frames(pipe, settings), video_tokens(pipe, settings)) == (102, 204)
    shorter, smaller = (within_tokens(pipe, settings, most) for most in (100, 40))
    assert (shorter.num_frames, shorter.height, video_tokens(pipe, shorter)) == (158, 64, 94)
    assert (smaller.num_frames, smaller.height, video_tokens(pipe, smaller)) == (124, 32, 37)


def test_the_grid_of_a_packed_sequence_follows_from_its_coordinates():
    pipe = tiny_pipeline("minimax-h3")
    settings = resolve_settings(pipe, requested=SIZE | {"width": 64, "num_inference_steps": 2})
    trajectory = record_trajectory(pipe, ["red"], seeds=[0], settings=settings)
    inputs = trajectory.calls[0].inputs
    assert inputs["audio_hidden_states"].shape[1] == pipe.audio_tokens(124) == 414
    layout = TokenLayout(latents="packed", patch=(1, 2, 2), text="before")
    beside = inputs["encoder_hidden_states"].shape[1] + inputs["audio_hidden_states"].shape[1]
    assert layout.grid(inputs) == TokenGrid(frames=37, height=1, width=2, text_tokens=beside, text="before")
    assert trajectory.latents.shape == (1, 74, 16)
    for wrong in ({"video_indices": inputs["video_indices"][1:]}, {"position_ids": None}):
        with pytest.raises(InvalidInputError, match="called without positions of one video at the end"):
            layout.grid(dict(inputs) | wrong)


def test_the_plan_counts_text_and_sound_in_the_stream(model):
    planned = plan(model, recipe="s2q-w4a6", overrides=["calibration.height=32", "calibration.width=32"])
    longer = plan(
        model,
        recipe="s2q-w4a6",
        overrides=[*(f"calibration.{side}=32" for side in ("height", "width")), "calibration.max_sequence_length=112"],
    )
    assert planned.calibration.tokens == 37
    saved = planned.calibration.activation_bytes - longer.calibration.activation_bytes
    assert saved / planned.calibration.activation_bytes == pytest.approx(400 / (37 + 414 + 512), rel=0.01)


def test_arguments_whose_shape_changes_between_steps_are_kept_step_by_step():
    timesteps = [torch.tensor([0.0]), torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.4])]
    argument = Argument.of("timestep", timesteps, branches=None)
    stored = Argument.load("timestep", argument.to_record(), argument.tensors("timestep"))
    for step, expected in enumerate(timesteps):
        assert torch.equal(stored.at(step, -1), expected)
    indices = Argument.of("timestep_indices", [torch.zeros(4), torch.ones(4)], branches=None)
    assert torch.equal(indices.at(1, -1), torch.ones(4))
    with pytest.raises(InvalidInputError, match="argument x changes between steps and has no row per sample"):
        Argument.of("x", [torch.zeros(4), torch.ones(4)], branches=1)
