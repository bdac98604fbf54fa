"""What calibration computes on, told from a pipeline."""

import pytest
from diffusers import CogVideoXPipeline

from s2q.planning.cost import Workload
from s2q.planning.workload import workload_of
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
