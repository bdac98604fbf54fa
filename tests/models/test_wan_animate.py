"""Wan Animate beside what every family has to show: its videos, the frame of its image, the replaced character."""

import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.generation.denoise import denoise
from s2q.generation.generate import generate
from s2q.generation.prompts import prompt_list
from s2q.generation.settings import resolve_settings, video_tokens
from s2q.generation.trajectory import record_trajectory
from s2q.models import outer_linears
from s2q.models.wan_animate import WAN_ANIMATE
from tiny import image_prompts, moving_square, tiny_pipeline, video_size


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("wan-animate image")


@pytest.fixture(scope="module")
def settings(pipe):
    return resolve_settings(pipe, requested={**video_size(pipe), "num_inference_steps": 2})


def prompt_of(pipe, **videos):
    (given,) = image_prompts("a man", pipe=pipe)
    return prompt_list("prompts", [given | videos])


def latents(pipe, settings, **videos):
    return denoise(pipe, prompt_of(pipe, **videos), seeds=[0], settings=settings, decode=False).latents


def test_a_video_is_that_of_the_pipeline_called_by_hand(pipe, settings):
    result = denoise(pipe, prompt_of(pipe), seeds=[3], settings=settings)
    (given,) = image_prompts("a man", pipe=pipe)
    frames = pipe(
        **given,
        **{side: size for side, size in video_size(pipe).items() if side != "num_frames"},
        segment_frame_length=9,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).frames[0]
    by_hand = (torch.from_numpy(frames) * 255).round().to(torch.uint8)
    assert torch.equal(result.frames[0], by_hand)


def test_poses_and_face_decide_the_video_and_frames_behind_its_end_do_not(pipe, settings):
    first = latents(pipe, settings)
    assert torch.equal(latents(pipe, settings, pose_video=moving_square("red", frames=11)), first)
    for name in ("pose_video", "face_video"):
        assert not torch.equal(latents(pipe, settings, **{name: moving_square("blue")}), first)


def test_the_frame_of_the_image_is_counted(pipe, settings):
    call = record_trajectory(pipe, prompt_of(pipe), seeds=[0], settings=settings).calls[0]
    assert call.inputs["hidden_states"].shape[2] == call.output.shape[2] == 4
    assert video_tokens(pipe, settings) == call.inputs["hidden_states"][0, 0].numel() // 4


def test_a_background_and_a_mask_replace_a_character(pipe, settings):
    replaced = {"background_video": moving_square("green"), "mask_video": moving_square("white")}
    assert not torch.equal(latents(pipe, settings, **replaced), latents(pipe, settings))
    assert not torch.equal(
        latents(pipe, settings, **replaced | {"mask_video": moving_square("black")}),
        latents(pipe, settings, **replaced),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pose_video": None}, 'has no pose_video; WanAnimatePipeline needs that .*"image": PATH, "pose_video": PATH'),
        ({"image": None}, "has no image; WanAnimatePipeline needs an image per prompt"),
        ({"face_video": moving_square("red", frames=8)}, "face_video: a video has 8 frames; expected at least the 9"),
        ({"mask_video": moving_square("white")}, "mask_video: .* takes it with background_video only"),
    ],
)
def test_what_is_missing_or_too_short_is_named_before_any_step(pipe, changes, message, monkeypatch):
    monkeypatch.setattr(type(pipe), "__call__", lambda *_args, **_arguments: pytest.fail("it was called"))
    (given,) = image_prompts("a man", pipe=pipe)
    with pytest.raises(InvalidInputError, match=f"^prompt 1 of 1: {message}"):
        generate(pipe, prompts=[given | changes], **video_size(pipe))


def test_other_pipelines_refuse_videos():
    for name, prompt in (("wan", {"prompt": "a"}), ("wan 2.2 5b image", image_prompts("a")[0])):
        pipe = tiny_pipeline(name)
        with pytest.raises(InvalidInputError, match=r"^prompt 1 of 1: pose_video: Wan\w*Pipeline .*remove it"):
            generate(pipe, prompts=[prompt | {"pose_video": moving_square("red")}], **video_size(pipe))


def test_one_frame_is_refused(pipe):
    with pytest.raises(InvalidInputError, match="num_frames: got 1; WanAnimatePipeline makes at least 5 frames"):
        resolve_settings(pipe, requested={**video_size(pipe), "num_frames": 1})


def test_attention_to_the_face_is_outside_the_blocks(pipe):
    names = {linear.name for linear in outer_linears(pipe.transformer, WAN_ANIMATE)}
    assert {f"face_adapter.{block}.to_{kind}" for block in range(2) for kind in ("q", "k", "v", "out")} <= names
