"""Kandinsky 5 beside what every family has to show: its two branches, its latents, its processor of texts."""

from types import SimpleNamespace

import pytest
import torch

import s2q
from s2q.checkpoint import read_config
from s2q.common.errors import InvalidInputError
from s2q.generation.denoise import denoise
from s2q.generation.settings import check_prompts, resolve_settings
from s2q.generation.trajectory import record_trajectory, recorded_calls
from s2q.planning.workload import workload_of
from s2q.selection.options import Calibration
from tiny import tiny_call, tiny_pipeline, video_size


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("kandinsky5")


def settings_of(pipe, **requested):
    return resolve_settings(pipe, requested={**video_size(pipe), "num_inference_steps": 2, **requested})


def test_a_video_is_that_of_the_pipeline_called_with_the_seed(pipe):
    result = denoise(pipe, ["red"], seeds=[4], settings=settings_of(pipe))
    generator = torch.Generator().manual_seed(4)
    frames = pipe("red", **tiny_call(pipe), generator=generator, output_type="np").frames[0]
    assert torch.equal(result.frames[0], (torch.from_numpy(frames) * 255).round().to(torch.uint8))
    assert result.latents.shape == (1, 3, 2, 2, 4), "without the channels of an image and a mask"


def test_the_conditional_call_of_each_step_is_recorded(pipe):
    settings = settings_of(pipe, guidance_scale=3.0, negative_prompt="an ugly video")
    with recorded_calls({"transformer": pipe.transformer}) as calls:
        trajectory = record_trajectory(pipe, ["red"], seeds=[0], settings=settings)
    assert len(calls) == 4
    assert len(trajectory.calls) == 2
    lengths = [call.inputs["encoder_hidden_states"].shape[1] for call in calls]
    assert lengths[0] != lengths[1], "no call can have both"
    for call, (conditional, _) in zip(trajectory.calls, (calls[:2], calls[2:]), strict=True):
        assert trajectory.branches(call) == 1
        assert torch.equal(call.output, conditional.output)
        assert torch.equal(call.inputs["encoder_hidden_states"], conditional.inputs["encoder_hidden_states"])


def test_guidance_and_its_negative_prompt_decide_the_video(pipe):
    def latents(**requested):
        return denoise(pipe, ["red"], seeds=[0], settings=settings_of(pipe, **requested), decode=False).latents

    guided = latents(guidance_scale=3.0, negative_prompt="ugly")
    assert not torch.equal(guided, latents(guidance_scale=3.0, negative_prompt="blue"))
    assert not torch.equal(guided, latents(guidance_scale=1.0))


def test_one_branch_is_planned_with_guidance(pipe):
    group = Calibration(**video_size(pipe), steps=2, guidance_scale=3)
    workload = workload_of(pipe, group, recommended={}, components=None)
    assert (workload.branches, workload.rows) == (1, 1)
    with pytest.raises(InvalidInputError, match="negative_prompt: .* runs without guidance"):
        settings_of(pipe, guidance_scale=1.0, negative_prompt="ugly")


def test_int8_attention_is_that_of_the_video(pipe, tmp_path):
    s2q.quantize(pipe, recipe="rtn-w4a6", out=tmp_path / "out", overrides=["attention.num_bits=8"])
    modules = read_config(tmp_path / "out").attention_modules()
    assert list(modules) == [f"visual_transformer_blocks.{block}.self_attention" for block in range(2)]
    (video,) = s2q.generate(tmp_path / "out", prompts=["red"], **video_size(pipe), num_inference_steps=1)
    assert video.frames.shape == (9, 16, 16, 3)


def test_the_tokens_of_a_prompt_are_counted_by_the_tokenizer_of_a_processor(pipe):
    settings = settings_of(pipe, max_sequence_length=8)
    asked, tokenizer = [], pipe.tokenizer

    def counted(text, **options):
        asked.append(text)
        return tokenizer(text, **options)

    processor = SimpleNamespace(tokenizer=counted)
    others = {"config": pipe.config, "components": pipe.components}
    given = SimpleNamespace(transformer=pipe.transformer, tokenizer=processor, **others)
    check_prompts(given, ["red"], settings)
    assert asked == ["red"]
    with pytest.raises(InvalidInputError, match=r"has \d+ tokens, but the transformer reads 8"):
        check_prompts(given, ["a prompt of more tokens than these"], settings)
