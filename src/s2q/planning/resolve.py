"""Which linear gets which scheme under a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from s2q.common.components import full_name
from s2q.common.errors import InvalidInputError, nearest_names
from s2q.core.schemes import LinearScheme, num_groups
from s2q.models import BlockLinear, block_linears, family_of, outer_linears
from s2q.planning.allocation import allocation_bytes, allocation_schemes
from s2q.recipes.schema import Recipe


def recipe_linears(recipe: Recipe, transformers: Mapping[str, nn.Module]) -> list[BlockLinear]:
    """List the linears that a recipe is about: those of the blocks, and the outer ones where it quantizes them.

    Args:
        recipe: The recipe.
        transformers: Those of a pipeline, by component, each of a supported family; may live on the meta device.

    Returns:
        The linears, one transformer after the other, by their names among those of all (`full_name`).

    Raises:
        InvalidInputError: If a class is not supported.
    """
    linears = []
    for component, transformer in transformers.items():
        family = family_of(transformer)
        outer = [] if recipe.outer is None else outer_linears(transformer, family)
        own = [*block_linears(transformer, family), *outer]
        linears += [replace(linear, name=full_name(component, linear.name)) for linear in own]
    return linears


def assign_schemes(recipe: Recipe, linears: Sequence[BlockLinear]) -> dict[str, LinearScheme]:
    """Give every linear that the recipe quantizes its scheme; where schemes are allocated in the run, the largest.

    Args:
        recipe: The recipe.
        linears: What `recipe_linears` lists.

    Returns:
        Scheme by full name, in the order of `linears`; linears that stay as they are do not appear.

    Raises:
        InvalidInputError: If nothing is left to quantize, a pattern in `skip` matches no linear, a group size, or none
            of those to be allocated, divides the in features of a linear (the message names it), or the budget of an
            allocation is too small.
    """
    names = [linear.name for linear in linears]
    for pattern in recipe.skip:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = nearest_names(pattern, names, count=1)
            hint = f"; the nearest is {near[0]}" if near else ""
            raise InvalidInputError(f"recipe {recipe.name}: skip pattern {pattern!r} matches none of the linears{hint}")
    by_role = {
        "linear": recipe.linear_scheme(),
        "text": recipe.linear_scheme(of_text=True),
        "modulation": recipe.modulation_scheme(),
        "outer": recipe.outer_scheme(),
    }
    schemes: dict[str, LinearScheme] = {}
    allocated = []
    for linear in linears:
        scheme = by_role["text" if linear.sees_text else linear.role]
        if scheme is None or any(fnmatchcase(linear.name, pattern) for pattern in recipe.skip):
            continue
        if recipe.allocation is not None and linear.role == "linear":
            *_, scheme = allocation_schemes(recipe, linear).values()
            allocated.append(linear)
        try:
            for one in (scheme.weight, scheme.activation):
                if one is not None:
                    num_groups(one, linear.in_features)
        except InvalidInputError as error:
            raise InvalidInputError(f"{linear.name}: {error}") from error
        schemes[linear.name] = scheme
    if not schemes:
        raise InvalidInputError(
            f"recipe {recipe.name}: none of the {len(names)} linears is left to quantize; "
            f"skip is {list(recipe.skip)}, remove a pattern"
        )
    if allocated:
        allocation_bytes(recipe, allocated)
    return schemes
