"""What calibration computes on, told from a pipeline."""

import pytest
from diffusers import CogVideoXPipeline

from s2q.common.errors import InvalidInputError
from s2q.planning import plan
from s2q.planning.cost import Workload
from s2q.planning.workload import calibration_settings, workload_of
from s2q.selection.options import Calibration
from tiny import tiny_pipeline

SIZES = {"num_frames": 9, "height": 16, "width": 16}


class OwnPipeline(CogVideoXPipeline):
    """A pipeline that someone derived from diffusers' own."""


def workload(pipe):
    return workload_of(pipe, Calibration(**SIZES), recommended={}, component_bytes=7)


@pytest.mark.parametrize("own", [False, True], ids=["diffusers", "derived"])
def test_the_tokens_of_a_pipeline_and_of_one_derived_from_it(own):
    pipe = tiny_pipeline("cogvideox")
    pipe = OwnPipeline(**pipe.components) if own else pipe
    expected = Workload(tokens=3 * 1 * 1, frames=3, text_tokens=16, branches=2, rows=2, component_bytes=7)
    assert workload(pipe) == expected


def test_branches_that_are_called_one_by_one():
    found = workload(tiny_pipeline("wan"))
    assert (found.branches, found.rows) == (2, 1)


def test_a_pipeline_that_calibration_does_not_run():
    assert workload(tiny_pipeline("cogvideox image")) is None


@pytest.mark.parametrize(
    ("most", "frames", "side"), [(10**6, 33, 32), (36, 33, 32), (35, 25, 32), (12, 9, 32), (11, 9, 16)]
)
def test_max_tokens_takes_frames_and_then_their_size(most, frames, side):
    pipe, sizes = tiny_pipeline("cogvideox rotary"), {"num_frames": 33, "height": 32, "width": 32}
    settings = calibration_settings(pipe, Calibration(**sizes, max_tokens=most), recommended={})
    assert (settings.num_frames, settings.height, settings.width) == (frames, side, side)
    found = workload_of(pipe, Calibration(**sizes, max_tokens=most), recommended={}, component_bytes=0)
    assert found.tokens <= most


def test_max_tokens_below_the_smallest_video_are_refused():
    with pytest.raises(InvalidInputError, match=r"calibration.max_tokens=2: the smallest video has 3 tokens; use more"):
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
