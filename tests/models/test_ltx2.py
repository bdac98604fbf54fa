"""LTX-2 beside what every family has to show: its sound, its noise, its guidance."""

import pytest
import torch

import s2q
from s2q.checkpoint import read_config
from s2q.generation.denoise import denoise
from s2q.generation.settings import resolve_settings
from s2q.generation.trajectory import record_trajectory
from s2q.models import block_linears, family_of
from s2q.planning.workload import workload_of
from s2q.selection.options import Calibration
from tiny import tiny_call, tiny_pipeline, video_size

QUICK = ["calibration.samples=2", "calibration.steps=2", "calibration.n_prompts=1", "distillation.epochs=1"]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("ltx-2")


def settings_of(pipe, **requested):
    return resolve_settings(pipe, requested={**video_size(pipe), "num_inference_steps": 2, **requested})


def test_a_video_is_that_of_the_pipeline_called_with_the_seed(pipe):
    result = denoise(pipe, ["red", "blue"], seeds=[3, 4], settings=settings_of(pipe))
    options = tiny_call(pipe) | family_of(pipe.transformer).call
    frames = pipe("blue", **options, generator=torch.Generator().manual_seed(4), output_type="np").frames[0]
    by_hand = (torch.from_numpy(frames) * 255).round().to(torch.uint8)
    assert float((result.frames[1].float() - by_hand.float()).abs().max()) <= 1


@pytest.mark.parametrize(("weight", "branches"), [(1.0, 1), (3.0, 2)])
def test_a_step_is_one_call_of_one_or_two_branches(pipe, weight, branches):
    settings = settings_of(pipe, guidance_scale=weight)
    trajectory = record_trajectory(pipe, ["red"], seeds=[0], settings=settings)
    assert [trajectory.branches(call) for call in trajectory.calls] == [branches] * 2


def test_the_tokens_of_the_sound_are_planned(pipe):
    workload = workload_of(pipe, Calibration(**video_size(pipe), steps=2), recommended={}, components=None)
    trajectory = record_trajectory(pipe, ["red"], seeds=[0], settings=settings_of(pipe))
    inputs = trajectory.calls[0].inputs
    assert workload.audio_tokens == inputs["audio_hidden_states"].shape[1] == 9
    assert workload.tokens == inputs["hidden_states"].shape[1]


def test_linears_see_the_tokens_that_they_are_listed_for(pipe):
    family, rows = family_of(pipe.transformer), {}
    handles = [
        module.register_forward_pre_hook(lambda _module, args, name=name: rows.update({name: args[0].shape[1]}))
        for name, module in pipe.transformer.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    trajectory = record_trajectory(pipe, ["red"], seeds=[0], settings=settings_of(pipe))
    for handle in handles:
        handle.remove()
    inputs = trajectory.calls[0].inputs
    text, sound, video = (
        inputs[name].shape[1] for name in ("encoder_hidden_states", "audio_hidden_states", "hidden_states")
    )
    for linear in block_linears(pipe.transformer, family):
        assert rows[linear.name] == (text if linear.sees_text else sound if linear.sees_audio else video)


def test_the_loss_has_the_sound_in_it(pipe, tmp_path):
    """With nothing quantized but the feed-forward layers of the sound, the loss of the last block is theirs."""
    pipe.save_pretrained(tmp_path / "model")
    others = [f"*.{name}.*" for name in ("attn1", "attn2", "ff", "audio_attn1", "audio_attn2")]
    others += ["*.audio_to_video_attn.*", "*.video_to_audio_attn.*"]
    sizes = [f"calibration.{name}={value}" for name, value in video_size(pipe).items()]
    report = s2q.quantize(
        tmp_path / "model",
        recipe="s2q-w4a6",
        prompts=["red"],
        out=tmp_path / "out",
        overrides=[*QUICK, *sizes, "outer=null", f"skip={others}"],
    )
    layers = {name.split(".", 2)[2] for name in read_config(tmp_path / "out").layers}
    assert layers == {"audio_ff.net.0.proj", "audio_ff.net.2"}
    assert all(0 < block.loss["final"] < block.loss["rtn"] for block in report.blocks)
