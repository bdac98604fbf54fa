"""What may be allocated to each block linear, and how many bytes there are for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from s2q.common.errors import InvalidInputError
from s2q.core.schemes import LinearScheme, PerGroup, QuantScheme, weight_bytes
from s2q.models import BlockLinear
from s2q.recipes.schema import Recipe


def allocation_schemes(recipe: Recipe, linear: BlockLinear) -> dict[int, LinearScheme]:
    """Return the schemes that a linear may be given.

    Args:
        recipe: A recipe that allocates.
        linear: The linear.

    Returns:
        Scheme by candidate, those that take fewer bytes first: large groups before small ones, few bits before many.

    Raises:
        InvalidInputError: If no group size divides its in features; names the linear.
    """
    assert recipe.allocation is not None
    candidates, scheme = sorted(recipe.allocation.candidates), recipe.linear_scheme(of_text=linear.sees_text)
    if recipe.allocation.what == "weight_bits":
        return {bits: replace(scheme, weight=replace(scheme.weight, num_bits=bits)) for bits in candidates}
    sizes = [size for size in reversed(candidates) if linear.in_features % size == 0]
    if not sizes:
        fits = [size for size in (16, 32, 64, 128, 256) if linear.in_features % size == 0] or [linear.in_features]
        raise InvalidInputError(
            f"{linear.name}: in_features={linear.in_features} is divisible by none of allocation.candidates="
            f"{list(recipe.allocation.candidates)}; add {fits[-1]} to them, or the linear to skip"
        )
    activation = scheme.activation
    return {
        size: LinearScheme(
            weight=_grouped(scheme.weight, size), activation=None if activation is None else _grouped(activation, size)
        )
        for size in sizes
    }


def allocation_bytes(recipe: Recipe, linears: Sequence[BlockLinear]) -> int:
    """Return how many bytes the weights of linears may take together, scales included.

    Args:
        recipe: A recipe that allocates.
        linears: The linears that get their schemes by it.

    Raises:
        InvalidInputError: If the smallest candidates take more than the budget; says how much that is.
    """
    assert recipe.allocation is not None
    weights = sum(one.in_features * one.out_features for one in linears)
    limit = math.floor(recipe.allocation.budget * weights / 8)
    smallest = 0
    for one in linears:
        scheme = next(iter(allocation_schemes(recipe, one).values()))
        smallest += weight_bytes(scheme.weight, one.out_features, one.in_features)
    if smallest > limit:
        needed = math.ceil(8 * smallest / weights * 1000) / 1000
        raise InvalidInputError(
            f"recipe {recipe.name}: allocation.budget={recipe.allocation.budget} bits a weight, but the smallest "
            f"candidates of its {len(linears)} linears take {needed} with their scales; set it to at least that"
        )
    return limit


def _grouped(scheme: QuantScheme, size: int) -> QuantScheme:
    return (
        replace(scheme, granularity=PerGroup(group_size=size)) if isinstance(scheme.granularity, PerGroup) else scheme
    )
