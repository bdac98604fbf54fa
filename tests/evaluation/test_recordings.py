"""Trajectories that go to the disk come back bit for bit, whatever the layout of their tensors."""

import pytest
import torch

from s2q.evaluation.recordings import Recordings
from s2q.generation.settings import resolve_settings
from s2q.generation.trajectory import record_trajectory
from tiny import tiny_pipeline, video_size
from tiny_families import TEXT_TO_VIDEO


@pytest.mark.parametrize("name", TEXT_TO_VIDEO)
def test_a_trajectory_on_the_disk_equals_the_one_in_memory(name):
    pipe = tiny_pipeline(name, num_layers=1 if name != "wan 2.2 a14b" else None)
    settings = resolve_settings(pipe, requested={**video_size(pipe), "num_inference_steps": 2})
    trajectory = record_trajectory(pipe, ["a"], seeds=[0], settings=settings)
    recordings = Recordings(memory_bytes=1)
    recordings.add(trajectory)
    recordings.add(trajectory)  # the first took the memory
    for call, again in zip(trajectory.calls, recordings[1].calls, strict=True):
        assert torch.equal(call.output, again.output)
        assert call.inputs.keys() == again.inputs.keys()
        tensors = {key: value for key, value in call.inputs.items() if isinstance(value, torch.Tensor)}
        assert all(torch.equal(value, again.inputs[key]) for key, value in tensors.items())
