"""Sensitivity: the velocity error with the linears of one kind quantized, all others at full precision.

A kind is a linear in all blocks, "blocks.*.attn1.to_q". Its packed linears take the place of those of the
full-precision model, one kind at a time. The errors of all kinds need not add up to that of the model.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from s2q.common.components import full_name, pattern_of, split_name, transformers_of
from s2q.common.errors import InvalidInputError
from s2q.common.progress import Tick
from s2q.evaluation.velocity import velocity_errors
from s2q.generation.defaults import model_label
from s2q.generation.load import is_checkpoint
from s2q.generation.trajectory import Trajectory
from s2q.models import ModelSource, family_of, token_layout
from s2q.nn import follow_tokens, unfollow_tokens
from s2q.nn.packed import PackedLinear
from s2q.nn.swap import replace_module

Kinds = Mapping[str, Mapping[str, PackedLinear]]
"""Packed linears by kind and full name."""


def linears_by_kind(transformers: Mapping[str, nn.Module]) -> Kinds:
    """Return the packed linears of transformers, by component; none of full-precision ones."""
    kinds: dict[str, dict[str, PackedLinear]] = defaultdict(dict)
    for component, transformer in transformers.items():
        for name, module in transformer.named_modules():
            if isinstance(module, PackedLinear):
                full = full_name(component, name)
                kinds[pattern_of(full)][full] = module
    return dict(kinds)


def check_measurable(model: Any, reference: Any) -> None:
    """Refuse a model that s2q has not quantized, and a quantized reference; both are pipelines or resolved sources."""

    def packed(side: Any) -> bool:
        return is_checkpoint(side) if isinstance(side, ModelSource) else bool(linears_by_kind(transformers_of(side)))

    if not packed(model):
        raise InvalidInputError(f"{model_label(model)}: sensitivity needs a model that s2q quantized")
    if packed(reference) or (isinstance(reference, ModelSource) and reference.is_quantized):
        raise InvalidInputError(f"{model_label(reference)}: sensitivity needs a full-precision reference")


def kind_errors(
    teachers: Mapping[str, nn.Module], kinds: Kinds, trajectory: Trajectory, *, step_done: Tick = lambda: None
) -> list[dict[str, float]]:
    """Measure the velocity error of each kind of packed linears alone; teachers and linears are as before in the end.

    Args:
        teachers: Full-precision transformers by component; no other thread may use them meanwhile.
        kinds: Packed linears of the quantized transformers, on any device.
        step_done: Called after each step of each kind.

    Returns:
        For each video of the trajectory the mean over its steps of the relative squared error, by kind.
    """
    errors: list[dict[str, float]] = [{} for _ in trajectory.prompts]
    for kind, linears in kinds.items():
        with _quantized(teachers, linears):
            by_video = velocity_errors(teachers, trajectory, step_done=step_done)
        for entry, steps in zip(errors, by_video, strict=True):
            entry[kind] = sum(steps) / len(steps)
    return errors


@contextmanager
def _quantized(teachers: Mapping[str, nn.Module], linears: Mapping[str, PackedLinear]) -> Iterator[None]:
    """Put packed linears into the place, and onto the devices, of full-precision ones."""
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    devices = {full: linear.weight.device for full, linear in linears.items()}
    try:
        for full, linear in linears.items():
            component, name = split_name(full)
            teacher = teachers[component]
            original = teacher.get_submodule(name)
            replace_module(teacher, name, linear.to(next(original.parameters()).device))
            replaced.append((teacher, name, original))
            if linear.needs_grid:
                follow_tokens(teacher, token_layout(teacher, family_of(teacher)))
        yield
    finally:
        for teacher, name, original in replaced:
            replace_module(teacher, name, original)
            unfollow_tokens(teacher)
        for full, linear in linears.items():
            linear.to(devices[full])
