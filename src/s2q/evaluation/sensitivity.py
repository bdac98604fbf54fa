"""Sensitivity: the velocity error with the linears of one kind quantized, all others at full precision.

A kind is a linear in all blocks, "blocks.*.attn1.to_q". The quantized linears of the other kinds are replaced by those
of the full-precision model, so that host memory has to have room for both models. The errors of all kinds need not add
up to that of the model.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2q.common.components import full_name, pattern_of, split_name
from s2q.common.errors import InvalidInputError
from s2q.common.progress import Tick
from s2q.evaluation.velocity import velocity_errors
from s2q.generation.trajectory import Trajectory
from s2q.nn.packed import PackedLinear
from s2q.nn.swap import replace_module


@dataclass(frozen=True, kw_only=True)
class LinearWeights:
    """Weight [out, in] and bias [out] of a full-precision linear, on the CPU."""

    weight: Tensor
    bias: Tensor | None

    def linear(self, device: torch.device) -> nn.Linear:
        """Build the linear, in its own dtype."""
        out_features, in_features = self.weight.shape
        linear = nn.Linear(in_features, out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight.to(device), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(device), requires_grad=False)
        return linear


def linear_weights(transformers: Mapping[str, nn.Module]) -> dict[str, LinearWeights]:
    """Return the linears of full-precision transformers by full name; weights on the CPU are not copied."""
    return {
        full_name(component, name): LinearWeights(
            weight=module.weight.detach().cpu(), bias=None if module.bias is None else module.bias.detach().cpu()
        )
        for component, transformer in transformers.items()
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
    }


def linears_by_kind(transformers: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Return the packed linears of transformers, full names by kind, in the order of the modules."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for component, transformer in transformers.items():
        for name, module in transformer.named_modules():
            if isinstance(module, PackedLinear):
                kinds[pattern_of(full_name(component, name))].append(full_name(component, name))
    return dict(kinds)


def kind_errors(
    students: Mapping[str, nn.Module],
    weights: Mapping[str, LinearWeights],
    trajectory: Trajectory,
    *,
    step_done: Tick = lambda: None,
) -> list[dict[str, float]]:
    """Measure the velocity error of each kind of packed linears alone; the students keep theirs.

    Args:
        students: Quantized transformers by component.
        weights: The full-precision linears, `linear_weights`.
        step_done: Called after each step of each kind.

    Returns:
        For each video of the trajectory the mean over its steps of the relative squared error, by kind.

    Raises:
        InvalidInputError: A student has no packed linears.
    """
    kinds = linears_by_kind(students)
    if not kinds:
        raise InvalidInputError("sensitivity: the model has no linears that s2q quantized; expected an s2q checkpoint")
    errors: list[dict[str, float]] = [{} for _ in trajectory.prompts]
    for kind in kinds:
        others = [name for other, group in kinds.items() if other != kind for name in group]
        with _full_precision(students, weights, others):
            by_video = velocity_errors(students, trajectory, step_done=step_done)
        for entry, steps in zip(errors, by_video, strict=True):
            entry[kind] = sum(steps) / len(steps)
    return errors


@contextmanager
def _full_precision(
    students: Mapping[str, nn.Module], weights: Mapping[str, LinearWeights], names: Sequence[str]
) -> Iterator[None]:
    """Replace linears by those of the full-precision model, and put them back at the end."""
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for full in names:
            component, name = split_name(full)
            student = students[component]
            packed = student.get_submodule(name)
            device = next(packed.parameters()).device
            replace_module(student, name, weights[full].linear(device))
            replaced.append((student, name, packed))
        yield
    finally:
        for student, name, packed in replaced:
            replace_module(student, name, packed)
