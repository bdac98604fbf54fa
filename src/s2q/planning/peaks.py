"""Peak memory of each stage of a run, and the offload with which its samples are generated.

Generating samples has on the device

    none     Σ weights of all components + a call of a transformer
    model    max(weights of a transformer + a call, weights of another component)
    group    the same of what is outside of blocks, and of two blocks

and calibrating a block, the same with every offload, the block and a step (`cost`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import nn

from s2q.common.components import full_name
from s2q.common.memory import Offload
from s2q.core.storage import LinearStorage
from s2q.models import BlockLinear, block_names, family_of
from s2q.planning.cost import (
    BlockShape,
    CalibrationCost,
    Machine,
    PartBytes,
    Workload,
    block_shapes,
    calibration_cost,
    forward_bytes,
    nearest_bytes,
)
from s2q.recipes.schema import Recipe


@dataclass(frozen=True, kw_only=True)
class StagePeaks:
    """The most memory that is taken by the end of each stage, by name; None if it is not known.

    Attributes:
        offload: How samples are generated; None for recipes that do not calibrate, and if memory is not known.
    """

    stages: Mapping[str, int | None]
    offload: Offload | None = None

    def fit(self, machine: Machine) -> bool:
        """Tell whether no stage takes more than the device has, as far as that is known."""
        there = machine.memory_bytes
        return there is None or all(peak is None or peak <= there for peak in self.stages.values())


def transformer_parts(transformers: Mapping[str, nn.Module], sizes: Mapping[str, int]) -> dict[str, PartBytes]:
    """Return the weights of transformers, by component; `sizes` are those of their tensors by full name."""
    parts = {}
    for component, transformer in transformers.items():
        blocks = dict.fromkeys(block_names(transformer, family_of(transformer)), 0)
        whole = 0
        for name in transformer.state_dict():
            size = sizes[full_name(component, name)]
            whole += size
            if (block := ".".join(name.split(".")[:2])) in blocks:
                blocks[block] += size
        parts[component] = PartBytes.of(whole, list(blocks.values()))
    return parts


def collect_bytes(
    offload: Offload, transformers: Iterable[PartBytes], others: Iterable[PartBytes], *, forward: int
) -> int:
    """Return what generating samples has on the device; `forward` is what a call of a transformer holds."""
    if offload == "none":
        return sum(part.whole for part in (*transformers, *others)) + forward
    sizes, rest = (
        [part.whole if offload == "model" else part.paged for part in parts] for parts in (transformers, others)
    )
    return max(max(sizes) + forward, *rest)


def chosen_offload(
    machine: Machine, transformers: Sequence[PartBytes], others: Sequence[PartBytes], *, forward: int
) -> Offload:
    """Return how samples are generated on a machine: as it says, or the first way that fits, the last if none does."""
    if machine.offload != "auto":
        return machine.offload
    limit = None if machine.is_host else machine.step_limit
    ways: tuple[Offload, ...] = get_args(Offload)
    if limit is None:
        return ways[0]
    room = limit // machine.sharing
    fitting = (way for way in ways if collect_bytes(way, transformers, others, forward=forward) <= room)
    return next(fitting, ways[-1])


def stage_peaks(
    recipe: Recipe,
    shapes: Sequence[BlockShape],
    cost: CalibrationCost | None,
    layers: Sequence[LinearStorage],
    *,
    transformers: Sequence[PartBytes],
    workload: Workload | None,
    machine: Machine,
    dtype: torch.dtype,
) -> StagePeaks:
    """Plan the memory of the stages of a run, as reports have it; arguments are those of `plan.plan_transformers`."""
    base = machine.process_bytes
    weights = sum(part.whole for part in transformers)
    if not recipe.calibrates:
        largest = max(layer.shape[0] * layer.shape[1] for layer in layers)
        blocks = base + (machine.added_bytes(weights) if machine.is_host else 0) + nearest_bytes(recipe) * largest
        packed = max(layer.bytes for layer in layers)
        return StagePeaks(stages={"blocks": blocks, "assemble": (blocks if machine.is_host else 0) + packed})
    allocates = () if recipe.allocation is None else ("allocate",)
    names = ("collect", "select", *allocates, "blocks", "assemble")
    if cost is None or workload is None:
        return StagePeaks(stages=dict.fromkeys(names))
    forward = forward_bytes(shapes, workload.rows, dtype.itemsize)
    others = list((workload.components or {}).values())
    offload = chosen_offload(machine, transformers, others, forward=forward)
    held = collect_bytes(offload, transformers, others, forward=forward)
    collect = base + machine.added_bytes(held - forward) + forward
    block = blocks_bytes(recipe, shapes, cost, machine=machine)
    blocks = max(collect, base + machine.runtime_bytes + block + (cost.host_bytes if machine.is_host else 0))
    again = recipe.calibration.trajectory_2 == "quantized"  # samples of the second transformer come after blocks
    stages = {name: collect if name in ("collect", "select") and not again else blocks for name in names}
    return StagePeaks(stages=stages, offload=offload)


def blocks_bytes(recipe: Recipe, shapes: Sequence[BlockShape], cost: CalibrationCost, *, machine: Machine) -> int:
    """Return what the device holds at most while a block is calibrated."""
    itemsize, checkpointed = cost.torch_dtype.itemsize, cost.gradient_checkpointing
    return max(
        shape.peak_bytes(recipe, checkpointed=checkpointed, itemsize=itemsize, on_host=machine.is_host)
        for shape in shapes
    )


def fitting_tokens(
    recipe: Recipe,
    transformers: Mapping[str, nn.Module],
    linears: Sequence[BlockLinear],
    *,
    parts: Sequence[PartBytes],
    workload: Workload,
    machine: Machine,
    dtype: torch.dtype,
) -> int | None:
    """Return the most video tokens, of whole frames, that a run fits a device with; None if no two frames do."""
    of_frame = workload.tokens // workload.frames

    def fits(frames: int) -> bool:
        smaller = replace(workload, tokens=frames * of_frame, frames=frames)
        shapes = block_shapes(transformers, linears, smaller)
        cost = calibration_cost(shapes, recipe, workload=smaller, machine=machine, dtype=dtype)
        return stage_peaks(
            recipe, shapes, cost, (), transformers=parts, workload=smaller, machine=machine, dtype=dtype
        ).fit(machine)

    low, high = 1, workload.frames  # two frames or more fit from low on, if low is above 1; high do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * of_frame if low > 1 else None
