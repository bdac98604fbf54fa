"""S²Q-VDiT's two parts added to another method, "quarot-w4a4+sds+std" (the paper's table 8).

`+sds` takes the salient samples (section 3.2); `+std` distils with tokens weighted by attention (section 3.3), which
needs something to learn: the method's own channel scale where it has one, else clipping ratios.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from s2q.common.errors import InvalidInputError
from s2q.distillation.options import Distillation
from s2q.nn import Clip
from s2q.recipes.schema import Recipe

SEPARATOR = "+"


def remarked(description: str, remark: str) -> str:
    """Return a recipe's description with a remark on what was changed."""
    return f"{description.rstrip('.')}; {remark}."


def with_variant(recipe: Recipe, variant: str) -> Recipe:
    """Return the recipe with a part added."""
    if not recipe.calibrates:
        raise InvalidInputError(f"recipe {recipe.name}: {SEPARATOR}{variant} needs a recipe that calibrates")
    changes = VARIANTS[variant](recipe)
    if all(getattr(recipe, group) == value for group, value in changes.items()):
        raise InvalidInputError(f"recipe {recipe.name}: already has what {SEPARATOR}{variant} adds; remove it")
    changes["name"] = f"{recipe.name}{SEPARATOR}{variant}"
    changes["description"] = remarked(recipe.description, f"with {SEPARATOR}{variant}")
    return Recipe.model_validate(dict(recipe) | changes)


def _sds(recipe: Recipe) -> dict[str, Any]:
    return {"calibration": replace(recipe.calibration, selection="sds")}


def _std(recipe: Recipe) -> dict[str, Any]:
    changes: dict[str, Any] = {"loss": replace(recipe.loss, weighting="attention")}
    if recipe.distillation is not None:
        return changes
    changes["distillation"] = Distillation()  # its defaults are the paper's
    if recipe.transforms.scale != "none":
        changes["transforms"] = replace(recipe.transforms, learn_scale=True)
    elif recipe.transforms.rotation != "kronecker":
        changes["clip"] = Clip(weights=True, activations=recipe.activations is not None)
    return changes


VARIANTS: Mapping[str, Callable[[Recipe], dict[str, Any]]] = MappingProxyType({"sds": _sds, "std": _std})
"""Suffixes of recipe names: the groups that each changes."""
