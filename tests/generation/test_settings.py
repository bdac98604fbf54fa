import pytest

from s2q.common.errors import InvalidInputError
from s2q.generation.settings import check_prompts, resolve_settings, video_tokens
from tiny import tiny_pipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("cogvideox")


def test_sizes_default_to_the_transformer_and_requests_win_over_recommendations(pipe):
    settings = resolve_settings(
        pipe,
        requested={"num_inference_steps": 3, "height": None},
        defaults={"num_inference_steps": 7, "guidance_scale": 4},
    )
    assert settings.to_dict() == {
        "num_frames": 9,
        "height": 16,
        "width": 16,
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
    }
    assert resolve_settings(pipe).num_inference_steps == 50
    assert video_tokens(pipe, settings) == 3 * 1 * 1


@pytest.mark.parametrize("num_frames", [1, 9, 17])
def test_frames_that_come_back_as_asked_are_accepted(pipe, num_frames):
    assert resolve_settings(pipe, requested={"num_frames": num_frames}).num_frames == num_frames


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("num_frames", 10, "use 9 or 17"),
        ("num_frames", 5, "use 1 or 9"),
        ("num_frames", 13, "use 9 or 17"),
        ("num_frames", 0, "at least 1"),
        ("height", 24, "use 16 or 32"),
        ("width", 8, "use 16"),
        ("width", 17.5, "whole number"),
        ("num_inference_steps", 0, "at least 1"),
        ("num_inference_steps", 1001, "1000"),
        ("guidance_scale", float("nan"), "finite"),
        ("guidance_scale", float("inf"), "finite"),
        ("guidance_scale", -1.0, "at least 0"),
    ],
)
def test_what_the_model_cannot_take_is_refused_with_a_remedy(pipe, name, value, remedy):
    with pytest.raises(InvalidInputError, match=name) as error:
        resolve_settings(pipe, requested={name: value})
    assert remedy in str(error.value)


@pytest.mark.parametrize("num_frames", [5, 13])
def test_the_refused_frame_counts_really_come_back_longer(pipe, num_frames):
    frames = pipe(
        "a", num_frames=num_frames, height=16, width=16, num_inference_steps=1, max_sequence_length=16, output_type="pt"
    ).frames
    assert frames.shape[1] != num_frames


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "got none"),
        ([""], "empty"),
        (["a", "  "], "prompt 2 of 2"),
        (["x" * 15], "has 17 tokens, but the transformer reads 16"),
        ("a cat", "a list"),
    ],
)
def test_prompts_that_the_pipeline_cannot_take_are_refused(pipe, prompts, message):
    with pytest.raises(InvalidInputError, match=message):
        check_prompts(pipe, prompts, resolve_settings(pipe))


def test_a_prompt_of_exactly_the_limit_fits(pipe):
    longest = "x" * 14
    assert len(pipe.tokenizer(longest).input_ids) == 16
    check_prompts(pipe, [longest], resolve_settings(pipe))
