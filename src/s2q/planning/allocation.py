"""The allocation of a plan: its linears, and the most bytes that it may take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from s2q.core.storage import LinearStorage
from s2q.planning.resolve import LinearPlan, allocation_bytes
from s2q.recipes.schema import Recipe


@dataclass(frozen=True, kw_only=True)
class PlannedAllocation:
    """Allocation that a run will make per linear, as the recipe asks for it (`AllocationOptions`).

    Attributes:
        linears: How many linears it is for.
        most_bytes: What their weights and scales may take together.
        bytes: What they do take; None until the run has allocated.
    """

    what: str
    candidates: tuple[int, ...]
    budget: float
    linears: int
    most_bytes: int
    bytes: int | None


def with_allocation(
    recipe: Recipe,
    linears: Sequence[LinearPlan],
    layers: tuple[LinearStorage, ...],
    storage: dict[str, int | float],
) -> tuple[tuple[LinearStorage, ...], dict[str, int | float], PlannedAllocation | None]:
    """Return layers, storage and the allocation that the run will make of them; unchanged without one."""
    allocated = [] if recipe.allocation is None else [linear for linear in linears if linear.role == "linear"]
    allocation = _planned_allocation(recipe, allocated)
    if allocation is not None:
        storage = reduced(storage, sum(linear.weight_bytes for linear in allocated) - allocation.most_bytes)
        names = {linear.name for linear in allocated}
        layers = tuple(replace(layer, scheme=f"≤ {layer.scheme}") if layer.name in names else layer for layer in layers)
    return layers, storage, allocation


def _planned_allocation(recipe: Recipe, allocated: Sequence[LinearPlan]) -> PlannedAllocation | None:
    if recipe.allocation is None:
        return None
    largest = sum(linear.weight_bytes for linear in allocated)
    return PlannedAllocation(
        what=recipe.allocation.what,
        candidates=recipe.allocation.candidates,
        budget=recipe.allocation.budget,
        linears=len(allocated),
        most_bytes=min(largest, allocation_bytes(recipe, allocated)),
        bytes=None,
    )


def reduced(storage: Mapping[str, int | float], by: int) -> dict[str, int | float]:
    """Return the storage with so many bytes fewer."""
    full, quantized = storage["full_precision_bytes"], storage["quantized_bytes"] - by
    return {"full_precision_bytes": full, "quantized_bytes": quantized, "ratio": full / quantized}
