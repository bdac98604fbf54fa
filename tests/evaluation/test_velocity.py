import copy

import pytest
import torch

from s2q.common.errors import S2QError
from s2q.evaluation.velocity import velocity_errors
from s2q.generation.settings import resolve_settings
from s2q.generation.trajectory import record_trajectory
from tiny import tiny_pipeline


@pytest.fixture(scope="module", params=[False, True], ids=["positions", "rotary"])
def pipe(request):
    return tiny_pipeline("cogvideox rotary" if request.param else "cogvideox")


@pytest.fixture(scope="module")
def trajectory(pipe):
    settings = resolve_settings(pipe, requested={"num_inference_steps": 3, "guidance_scale": 4.0})
    return record_trajectory(pipe, ["red", "blue"], seeds=[0, 1], settings=settings)


class Scaled(torch.nn.Module):
    """A student that answers `factor` times what the teacher answers, the second video's rows `other` times."""

    def __init__(self, teacher, factor, other):
        super().__init__()
        self.teacher, self.factors = teacher, torch.tensor([factor, other, factor, other])
        self.dtype = torch.float32

    def forward(self, *, return_dict, **inputs):
        output = self.teacher(**inputs, return_dict=False)[0]
        return (output * self.factors.view(-1, 1, 1, 1, 1),)


def test_the_teacher_itself_has_no_error(pipe, trajectory):
    errors = velocity_errors({"transformer": pipe.transformer}, trajectory)
    assert [len(steps) for steps in errors] == [3, 3]
    assert max(max(steps) for steps in errors) < 1e-9


def test_a_known_error_is_found_for_each_video_alone(pipe, trajectory):
    ticks = []
    student = Scaled(pipe.transformer, 1.1, 0.5)
    first, second = velocity_errors({"transformer": student}, trajectory, step_done=lambda: ticks.append(1))
    assert first == pytest.approx([0.01] * 3, rel=1e-4)
    assert second == pytest.approx([0.25] * 3, rel=1e-4)
    assert len(ticks) == 3


def test_a_bfloat16_student_takes_a_float32_trajectory(pipe, trajectory):
    student = copy.deepcopy(pipe.transformer).to(torch.bfloat16)
    errors = velocity_errors({"transformer": student}, trajectory)
    assert 0 < max(map(max, errors)) < 0.01


def test_nan_is_an_error(pipe, trajectory):
    with pytest.raises(S2QError, match="not finite at step 0"):
        velocity_errors({"transformer": Scaled(pipe.transformer, float("nan"), 1.0)}, trajectory)
