"""The velocity error: how far one call of the student is from the teacher's, on the teacher's own trajectory.

    e_t = ‖v_q(x_t) − v_fp(x_t)‖² / ‖v_fp(x_t)‖²

with x_t the inputs recorded while the full-precision pipeline generated, both guidance branches together. The student
never sees its own earlier errors, so the figure does not bifurcate as final videos do: it is the steadiest of all.

Legend: `R` rows of a call (guidance branches times videos), `S` denoising steps.
"""

from collections.abc import Mapping
from typing import Any

import torch

from s2q.common.errors import S2QError
from s2q.common.progress import Tick
from s2q.generation.offload import leaving_device
from s2q.generation.trajectory import Trajectory, prediction_of


@torch.no_grad()
def velocity_errors(
    students: Mapping[str, torch.nn.Module], trajectory: Trajectory, *, step_done: Tick = lambda: None
) -> list[list[float]]:
    """Measure the velocity error at every recorded step; each student answers the calls of its namesake component.

    Returns:
        For each video the list of its `S` relative squared errors, dimensionless.
    """
    errors: list[list[float]] = [[] for _ in trajectory.prompts]
    with leaving_device(students.values()):
        for step, call in enumerate(trajectory.calls):
            student = students[call.transformer]
            device, dtype = next(student.parameters()).device, student.dtype
            inputs = {name: _to_device(value, device, dtype) for name, value in call.inputs.items()}
            output = prediction_of(student(**inputs, return_dict=False)).cpu()
            for video, steps in enumerate(errors):
                rows = trajectory.rows_of(call, video)
                teacher = call.output[rows].double()
                error = float((output[rows].double() - teacher).square().sum() / teacher.square().sum())
                if error != error or error == float("inf"):
                    raise S2QError(
                        f"velocity error: not finite at step {step} (timestep {call.timestep:g}), "
                        f"prompt {trajectory.prompts[video]!r}; the weights are damaged, or --dtype float16 overflows: "
                        "use bfloat16"
                    )
                steps.append(error)
            step_done()
    return errors


def _to_device(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):  # rotary tables stay float32, as the pipeline passes them
        return tuple(_to_device(item, device, torch.float32) for item in value)
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)
