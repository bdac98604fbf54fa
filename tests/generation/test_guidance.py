"""Settings of a generation reach the pipeline's call, in every family; those it cannot run are refused or dropped."""

import functools

import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.generation.prompts import Prompt
from s2q.generation.settings import prompt_token_limit, resolve_settings
from s2q.generation.trajectory import record_trajectory
from s2q.models import family_of, resolve_model
from tiny import prompts_of_a_call, tiny_pipeline, video_size
from tiny_families import TEXT_TO_VIDEO

STEPS = 3


@pytest.fixture
def called(monkeypatch):
    """Give pipelines a `__call__` that remembers its arguments; return it."""
    seen = []

    def watch(pipe):
        original = type(pipe).__call__

        @functools.wraps(original)
        def remember(self, **arguments):
            guider = getattr(self, "guider", None)
            seen.append({**arguments, "scheduler": self.scheduler, "guider": guider and guider.num_conditions})
            return original(self, **arguments)

        monkeypatch.setattr(type(pipe), "__call__", remember)
        return seen

    return watch


def other_scheduler(pipe):
    """A scheduler that fits a pipeline, with a shift if it has one."""
    own = {"cogvideox": "CogVideoXDPMScheduler", "minimax-h3": "MiniMaxH3Scheduler"}
    if (name := family_of(pipe.transformer).name) in own:
        return {"scheduler": own[name]} | ({"shift": 2.0} if name == "minimax-h3" else {})
    return {"scheduler": "FlowMatchLCMScheduler", "shift": 2.0}


@pytest.mark.parametrize("name", TEXT_TO_VIDEO)
def test_every_setting_reaches_the_call_and_one_branch_runs_without_guidance(name, called):
    pipe = tiny_pipeline(name)
    current, arguments = pipe.scheduler, called(pipe)
    is_guider = family_of(pipe.transformer).guidance == "guider"
    is_fixed = name == "cogvideox"
    length = {} if is_guider or is_fixed else {"max_sequence_length": 16 if name == "ltx-2" else 12}
    asked = {"num_inference_steps": STEPS, "guidance_scale": 1.0, **length, **other_scheduler(pipe), **video_size(pipe)}
    settings, prompts = resolve_settings(pipe, requested=asked), prompts_of_a_call(pipe)
    trajectory = record_trajectory(pipe, prompts, seeds=range(len(prompts)), settings=settings)
    (given,) = arguments
    used = given["scheduler"]
    assert type(used).__name__ == asked["scheduler"]
    assert used.config.get("shift") == asked.get("shift")
    timesteps = used.timesteps if name != "minimax-h3" else 1000 * (1 - used.timesteps)  # from 0 for noise to 1
    assert [call.timestep for call in trajectory.calls] == pytest.approx(timesteps.tolist())
    assert len(trajectory.calls) == STEPS
    assert {trajectory.branches(call) for call in trajectory.calls} == {1}
    assert given[family_of(pipe.transformer).frames_argument] == asked["num_frames"]
    sizes = ("height", "width", "num_inference_steps")
    assert [given[key] for key in sizes] == [asked[key] for key in sizes]
    if is_guider:
        assert given["guider"] == 1
    else:
        assert given["guidance_scale"] == 1.0
        assert given["max_sequence_length"] == length.get("max_sequence_length", prompt_token_limit(pipe))
    assert pipe.scheduler is current
    assert "step" not in vars(used)


ONE_BRANCH = ("hunyuanvideo", "kandinsky5", "minimax-h3")  # test_kandinsky5.py has the second


@pytest.mark.parametrize("name", [name for name in TEXT_TO_VIDEO if name not in ONE_BRANCH])
def test_the_negative_prompt_is_the_text_of_the_unconditional_branch_alone(name):
    pipe, asked = tiny_pipeline(name), {"num_inference_steps": 2, "guidance_scale": 3.0}
    embeddings, prompts = [], prompts_of_a_call(pipe)
    *others, last = prompts
    for negative, given in (
        ({}, prompts),
        ({"negative_prompt": "ugly"}, prompts),
        ({"negative_prompt": "ugly"}, [*others, Prompt(last, negative_prompt="")]),
    ):
        settings = resolve_settings(pipe, requested=asked | negative | video_size(pipe))
        trajectory = record_trajectory(pipe, given, seeds=range(len(prompts)), settings=settings)
        assert {trajectory.branches(call) for call in trajectory.calls} == {2}
        embeddings.append(trajectory.calls[0].inputs["encoder_hidden_states"])
    *both, mixed = embeddings
    expected = both[1].clone()
    expected[len(others)] = both[0][len(others)]
    torch.testing.assert_close(mixed, expected)
    for video in range(len(prompts)):
        without, with_text = (text[[video, len(prompts) + video]] for text in both)
        assert not torch.equal(without[0], with_text[0])
        torch.testing.assert_close(without[1], with_text[1])


def test_the_second_transformer_has_a_weight_of_its_own(called):
    pipe = tiny_pipeline("wan 2.2 a14b")
    arguments = called(pipe)
    asked = {"num_inference_steps": 2, "guidance_scale": 4.0, "guidance_scale_2": 3.0, **video_size(pipe)}
    record_trajectory(pipe, ["red"], seeds=[0], settings=resolve_settings(pipe, requested=asked))
    assert (arguments[0]["guidance_scale"], arguments[0]["guidance_scale_2"]) == (4.0, 3.0)


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("wan", {"guidance_scale_2": 2.0}, "denoises with one transformer here; remove it"),
        ("cogvideox", {"guidance_scale_2": 2.0}, "denoises with one transformer here; remove it"),
        ("wan", {"guidance_scale": 1.0, "guidance_scale_2": 1.0}, "denoises with one transformer here; remove it"),
        ("wan 2.2 a14b", {"guidance_scale": 1.0, "guidance_scale_2": 2.0}, "=1 runs without guidance; use a weight"),
        ("wan", {"guidance_scale": 1.0, "negative_prompt": "ugly"}, "negative_prompt.*=1 runs without guidance"),
        ("hunyuanvideo 1.5", {"guidance_scale": 0.5, "negative_prompt": "a"}, "=0.5 runs without guidance"),
        ("hunyuanvideo", {"negative_prompt": "ugly"}, "distilled into the transformer .* one branch; remove it"),
        ("wan", {"negative_prompt": "x" * 600}, "negative_prompt has 60. tokens, but the transformer reads 512"),
        ("wan", {"max_sequence_length": 513}, "got 513; the transformer reads at most 512 text tokens, use 512"),
        ("cogvideox", {"max_sequence_length": 15}, "got 15; the transformer reads exactly 16 text tokens, use 16"),
        ("ltx-2", {"max_sequence_length": 12}, "got 12; LTX2Pipeline takes multiples of 8, use 16"),
        ("hunyuanvideo 1.5", {"max_sequence_length": 16}, "has one length for all prompts, remove it"),
        ("wan", {"shift": 0}, "shift: got 0; expected a number above 0"),
        ("wan", {"negative_prompt": 3}, "negative_prompt: got 3; expected text"),
        ("wan", {"negative_prompt": "\ud83d"}, "not Unicode text"),
    ],
)
def test_what_the_pipeline_cannot_run_is_refused_before_and_after_its_weights_are_loaded(
    name, asked, message, tmp_path
):
    pipe = tiny_pipeline(name)
    pipe.save_pretrained(tmp_path)
    source = resolve_model(tmp_path)
    for asked_pipe in (pipe, source.meta_pipeline(source.meta_transformers())):
        with pytest.raises(InvalidInputError, match=message):
            resolve_settings(asked_pipe, requested=video_size(pipe) | asked)


def test_a_pair_of_transformers_runs_without_guidance_by_two_weights_of_1():
    pipe = tiny_pipeline("wan 2.2 a14b")
    settings = resolve_settings(pipe, requested=video_size(pipe) | {"guidance_scale": 1, "guidance_scale_2": 1})
    assert (settings.guidance_scale, settings.guidance_scale_2) == (1.0, None)


def test_guidance_for_a_model_without_is_refused_and_its_recommendation_dropped():
    pipe = tiny_pipeline("hunyuanvideo")
    assert resolve_settings(pipe).guidance_scale == 6.0
    pipe.transformer.register_to_config(guidance_embeds=False)
    assert resolve_settings(pipe, defaults={"guidance_scale": 4.0}).guidance_scale == 1.0
    with pytest.raises(InvalidInputError, match=r"guidance_scale: got 2; HunyuanVideoPipeline has no guidance.*use 1"):
        resolve_settings(pipe, requested={"guidance_scale": 2.0})


def test_recommendations_for_a_guidance_that_does_not_run_are_dropped():
    recommended = {"negative_prompt": "ugly", "guidance_scale_2": 3.0, "guidance_scale": 4.0}
    pipe = tiny_pipeline("wan 2.2 a14b")
    with_guidance = resolve_settings(pipe, requested=video_size(pipe), defaults=recommended)
    without = resolve_settings(pipe, requested=video_size(pipe) | {"guidance_scale": 1}, defaults=recommended)
    assert with_guidance.negative_prompt == "ugly"
    assert with_guidance.guidance_scale_2 == 3.0
    assert "negative_prompt" not in without.to_dict()
    assert "guidance_scale_2" not in without.to_dict()
