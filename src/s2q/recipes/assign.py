"""Which block linear gets which scheme under a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from s2q.core.errors import InvalidInputError, nearest_names
from s2q.core.schemes import LinearScheme, num_groups
from s2q.models import BlockLinear
from s2q.recipes.schema import Recipe


def assign_schemes(recipe: Recipe, linears: Sequence[BlockLinear]) -> dict[str, LinearScheme]:
    """Give every block linear that the recipe quantizes its scheme.

    Args:
        recipe: The recipe.
        linears: All linears of the blocks.

    Returns:
        Scheme by full name, in the order of `linears`; linears that stay as they are do not appear.

    Raises:
        InvalidInputError: If nothing is left to quantize, a pattern in `skip` matches no linear, or a group size does
            not divide the in features of a linear (the message names it).
    """
    names = [linear.name for linear in linears]
    for pattern in recipe.skip:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = nearest_names(pattern, names, count=1)
            hint = f"; the nearest is {near[0]}" if near else ""
            raise InvalidInputError(f"recipe {recipe.name}: skip pattern {pattern!r} matches none of the linears{hint}")
    schemes: dict[str, LinearScheme] = {}
    for linear in linears:
        scheme = recipe.modulation_scheme() if linear.role == "modulation" else recipe.linear_scheme()
        if scheme is None or any(fnmatchcase(linear.name, pattern) for pattern in recipe.skip):
            continue
        try:
            num_groups(scheme.weight, linear.in_features)
        except InvalidInputError as error:
            raise InvalidInputError(f"{linear.name}: {error}") from error
        schemes[linear.name] = scheme
    if not schemes:
        raise InvalidInputError(
            f"recipe {recipe.name}: none of the {len(names)} block linears is left to quantize; "
            f"skip is {list(recipe.skip)}, remove a pattern"
        )
    return schemes
