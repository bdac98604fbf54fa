"""The plan of a run whose model is loaded, and the order of its transformers."""

from __future__ import annotations

from dataclasses import replace

from s2q.calibration.teacher import Teacher
from s2q.common.components import text_encoders_of, transformers_of
from s2q.planning import Machine, Plan, plan_transformers, tensor_sizes
from s2q.planning.text_encoders import plan_encoders
from s2q.recipes.schema import Recipe


def plan_loaded(teacher: Teacher, recipe: Recipe, machine: Machine) -> Plan:
    """Plan a run with the weights that a process has read; see `planning.plan_transformers`."""
    transformers = transformers_of(teacher.pipe)
    widened = None if teacher.dtype == teacher.stored else teacher.dtype
    return plan_transformers(
        transformers,
        recipe,
        teacher.linears,
        model=teacher.name,
        sizes=tensor_sizes(transformers, None if widened is None else teacher.stored),
        dtype=teacher.stored,
        compute_dtype=widened,
        workload=teacher.workload,
        machine=replace(machine, holds_weights=not teacher.mapped),
        attention=teacher.attention,
        text_encoders=plan_encoders(
            recipe, text_encoders_of(teacher.pipe), dtype=None if teacher.source is None else teacher.stored
        ),
    )


def rounds_of(teacher: Teacher, recipe: Recipe) -> tuple[str | None, ...]:
    """Return the transformers to collect for and to quantize one after the other, by component; None is all together.

    They go apart where the second is calibrated on what the quantized first one generates.
    """
    if recipe.calibrates and recipe.calibration.trajectory_2 == "quantized" and len(teacher.transformers) > 1:
        return tuple(transformer.component for transformer in teacher.transformers)
    return (None,)
