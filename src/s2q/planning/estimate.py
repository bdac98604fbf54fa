"""Work of each stage of a run, and its time on a GPU that need not be here: an estimate with its range.

Counted FLOP and bytes over the peak rates of a data sheet, times shares of them that are assumed (`planning.gpus`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from s2q.common.components import split_name
from s2q.distillation.options import evaluations
from s2q.planning.cost import BlockShape, CalibrationCost, Workload
from s2q.planning.flop import Work, block_work, collecting_work, folding_work, judging_work, reaching_work
from s2q.planning.gpus import EXPECTED, FAST, SLOW, Rates
from s2q.planning.resolve import LinearPlan
from s2q.recipes.schema import Recipe


@dataclass(frozen=True, kw_only=True)
class TimeEstimate:
    """The time of a run on one GPU.

    Attributes:
        device: Name of the GPU, "h100".
        source: Of its peak rates.
        gpu_hours: Of all stages; `low` and `high` are its range.
    """

    device: str
    title: str
    source: str
    gpu_hours: float
    low: float
    high: float


def stage_work(
    recipe: Recipe,
    linears: Sequence[LinearPlan],
    shapes: Sequence[BlockShape],
    cost: CalibrationCost | None,
    *,
    workload: Workload | None,
    dtype: torch.dtype,
    transformers: Sequence[str],
    chained: bool,
    paged_bytes: int = 0,
) -> dict[str, Work]:
    """Count the work of each stage of a run, by name; stages that are not counted are missing.

    Args:
        shapes: Of all blocks; empty for recipes without calibration.
        dtype: Compute dtype of the model.
        transformers: Components of the pipeline's transformers.
        chained: Whether each block is called with what the one before returned.
        paged_bytes: Weights that each call of a transformer copies to the device (group offload).
    """
    if not recipe.calibrates:
        works = (_folding(linear) for linear in linears)
        return {"blocks": sum(works, start=Work())}
    if cost is None or workload is None:
        return {}
    epochs = [(group.epochs, evaluations(group.epochs)) for group in (recipe.distillation, recipe.refinement) if group]
    counted: dict[BlockShape, Work] = {}
    for shape in dict.fromkeys(shapes):
        counted[shape] = block_work(
            shape,
            recipe,
            workload=workload,
            dtype=cost.torch_dtype,
            samples=cost.samples,
            checkpointed=cost.gradient_checkpointing,
            epochs=epochs,
        )
    reached = reaching_work(shapes, dtype, samples=cost.samples, chained=chained, paged_bytes=paged_bytes)
    stages = {
        "collect": collecting_work(
            shapes,
            recipe,
            workload=workload,
            dtype=dtype,
            transformers=transformers,
            quantized={split_name(linear.name)[0] for linear in linears},
            paged_bytes=paged_bytes,
        ),
        "select": Work(),
        "blocks": sum((counted[shape] for shape in shapes), start=reached),
    }
    if recipe.allocation is not None:  # every candidate of every linear is judged by a pass through its block
        passes = min(recipe.allocation.samples, cost.samples) * len(recipe.allocation.candidates)
        judged = [judging_work(shape, cost.torch_dtype) * (passes * len(shape.inputs)) for shape in shapes]
        stages["allocate"] = sum(judged, start=Work())
    return stages


def time_estimate(work: Mapping[str, Work], rates: Rates) -> TimeEstimate:
    """Estimate the time of all stages together."""
    total = sum(work.values(), start=Work())
    low, middle, high = (rates.seconds(total, efficiency) / 3600 for efficiency in (FAST, EXPECTED, SLOW))
    return TimeEstimate(device=rates.name, title=rates.title, source=rates.source, gpu_hours=middle, low=low, high=high)


def _folding(linear: LinearPlan) -> Work:
    orders = (linear.path.left or 0) + (linear.path.right or 0)
    return folding_work(linear.in_features * linear.out_features, orders=orders)
