"""What calibration computes on, told from a pipeline."""

import logging
from dataclasses import replace

import pytest
from diffusers import CogVideoXPipeline

from s2q.common.errors import InvalidInputError
from s2q.common.log import log_once
from s2q.models.synthetic import synthetic_model
from s2q.planning import plan
from s2q.planning.cost import Workload
from s2q.planning.workload import calibration_settings, workload_of, workload_of_recipe, workload_of_synthetic
from s2q.recipes.load import load_recipe
from s2q.selection.options import Calibration
from tiny import tiny_pipeline, video_size, video_to_video
from tiny_families import TEXT_TO_VIDEO

SIZES = {"num_frames": 9, "height": 16, "width": 16}


class OwnPipeline(CogVideoXPipeline):
    """A pipeline that someone derived from diffusers' own."""


def workload(pipe):
    return workload_of(pipe, Calibration(**SIZES), recommended={}, components={})


@pytest.mark.parametrize("own", [False, True], ids=["diffusers", "derived"])
def test_the_tokens_of_a_pipeline_and_of_one_derived_from_it(own):
    pipe = tiny_pipeline("cogvideox")
    pipe = OwnPipeline(**pipe.components) if own else pipe
    expected = Workload(tokens=3 * 1 * 1, frames=3, text_tokens=16, branches=2, rows=2, components={})
    assert replace(workload(pipe), generation={}, called={}) == expected


def test_branches_that_are_called_one_by_one():
    found = workload(tiny_pipeline("wan"))
    assert (found.branches, found.rows) == (2, 1)


@pytest.mark.parametrize("name", TEXT_TO_VIDEO)
def test_without_guidance_one_branch_is_planned(name):
    pipe = tiny_pipeline(name)
    group = Calibration(**video_size(pipe), guidance_scale=1, steps=4)
    without = workload_of(pipe, group, recommended={"guidance_scale": 5.0}, components={})
    assert (without.branches, without.rows, without.steps) == (1, 1, 4)
    guided = replace(group, guidance_scale=5)
    if name == "minimax-h3":
        with pytest.raises(InvalidInputError, match="guidance_scale: got 5; MiniMaxH3Pipeline has no guidance"):
            workload_of(pipe, guided, recommended={}, components={})
        return
    with_guidance = workload_of(pipe, guided, recommended={}, components={})
    assert with_guidance.branches == (1 if name in ("hunyuanvideo", "kandinsky5") else 2)


def test_the_plan_of_a_family_has_its_generation_settings():
    pipe = tiny_pipeline("wan")
    group = Calibration(**SIZES, shift=8, negative_prompt="ugly", max_sequence_length=64)
    planned = workload_of(pipe, group, recommended={}, components={})
    assert planned.text_tokens == 64
    assert planned.generation == SIZES | {
        "num_inference_steps": 50,
        "guidance_scale": 5.0,
        "scheduler": "UniPCMultistepScheduler",
        "shift": 8.0,
        "negative_prompt": "ugly",
        "max_sequence_length": 64,
    }


def test_both_branches_as_samples_are_one_without_guidance():
    both = ["calibration.branches=both", "calibration.samples=10"]
    plans = {
        scale: plan("shapes-wan", recipe="s2q-w4a6", overrides=[*both, f"calibration.guidance_scale={scale}"])
        for scale in (1, 5)
    }
    assert [plans[scale].calibration.samples for scale in (1, 5)] == [10, 20]
    assert [plans[scale].generation["branches"] for scale in (1, 5)] == [1, 2]


def test_flop_of_collecting_without_guidance_are_half():
    recipe = ["calibration.selection=sds"]
    flop = {}
    for scale in (1, 5):
        planned = plan(
            "synthetic:wan-1.3b", recipe="s2q-w4a6", overrides=[*recipe, f"calibration.guidance_scale={scale}"]
        )
        flop[scale] = next(stage.flop for stage in planned.stages if stage.name == "collect")
    assert flop[5] == pytest.approx(2 * flop[1])


@pytest.mark.parametrize(
    ("name", "scale", "warns"), [("wan-Lightning", 5, True), ("wan-Lightning", 1, False), ("wan", 5, False)]
)
def test_a_distilled_model_with_guidance_is_a_warning(name, scale, warns, caplog):
    log_once.cache_clear()
    options = [f"calibration.{key}={value}" for key, value in (SIZES | {"guidance_scale": scale}).items()]
    recipe, names = load_recipe("s2q-w4a6", overrides=options), ("a-model", f"someone/{name}")
    with caplog.at_level(logging.WARNING):
        workload_of_recipe(tiny_pipeline("wan"), recipe, names=names, recommended={}, components={})
    assert ("looks step-distilled" in caplog.text) is warns
    assert ("--guidance-scale 1" in caplog.text) is warns


def test_settings_that_need_a_pipeline_are_refused_for_published_dimensions():
    with pytest.raises(
        InvalidInputError, match="has no pipeline to fit calibration.scheduler, calibration.num_frames to;"
    ):
        overrides = ["calibration.scheduler=FlowMatchEulerDiscreteScheduler", "calibration.num_frames=9"]
        plan("synthetic:wan-1.3b", recipe="s2q-w4a6", overrides=overrides)


def test_a_pipeline_that_calibration_does_not_run():
    assert workload(video_to_video()) is None


@pytest.mark.parametrize(
    ("most", "frames", "side"), [(10**6, 33, 32), (36, 33, 32), (35, 25, 32), (12, 9, 32), (11, 9, 16)]
)
def test_max_tokens_takes_frames_and_then_their_size(most, frames, side):
    pipe, sizes = tiny_pipeline("cogvideox rotary"), {"num_frames": 33, "height": 32, "width": 32}
    settings = calibration_settings(pipe, Calibration(**sizes, max_tokens=most), recommended={})
    assert (settings.num_frames, settings.height, settings.width) == (frames, side, side)
    found = workload_of(pipe, Calibration(**sizes, max_tokens=most), recommended={}, components={})
    assert found.tokens <= most


def test_max_tokens_below_the_smallest_video_are_refused():
    with pytest.raises(
        InvalidInputError, match=r"calibration.max_tokens=2: the smallest video has 3 tokens; raise it to that"
    ):
        calibration_settings(tiny_pipeline("cogvideox rotary"), Calibration(**SIZES, max_tokens=2), recommended={})


def test_max_tokens_of_a_model_that_takes_one_size_are_refused():
    pipe = tiny_pipeline("cogvideox rotary")
    pipe.transformer.register_to_config(use_learned_positional_embeddings=True, sample_frames=17)
    pipe.transformer.register_to_config(sample_height=16 // 8, sample_width=16 // 8)
    with pytest.raises(InvalidInputError, match=r"calibration.max_tokens=4: num_frames.*learned positions for 17 only"):
        calibration_settings(pipe, Calibration(**SIZES | {"num_frames": 17}, max_tokens=4), recommended={})


def test_max_tokens_of_published_dimensions():
    planned = plan("synthetic:hunyuanvideo", recipe="s2q-w4a6", overrides=["calibration.max_tokens=20000"])
    assert planned.calibration.tokens == 5 * 3600
    with pytest.raises(InvalidInputError, match="two frames of .* have 7200 tokens"):
        plan("synthetic:hunyuanvideo", recipe="s2q-w4a6", overrides=["calibration.max_tokens=7199"])


def test_max_tokens_of_published_dimensions_shorten_the_sound():
    def planned(name, *overrides):
        return workload_of_synthetic(synthetic_model(f"synthetic:{name}"), load_recipe("s2q-w4a6", overrides=overrides))

    assert planned("ltx-2").audio_tokens == planned("ltx-2", f"calibration.max_tokens={16 * 384}").audio_tokens == 126
    shorter = planned("ltx-2", f"calibration.max_tokens={4 * 384}")
    assert (shorter.frames, shorter.audio_tokens) == (4, round(25 / 24 * 25))  # 25 frames, 25 tokens a second
    assert planned("wan-1.3b").audio_tokens == 0
