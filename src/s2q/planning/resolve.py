"""From a recipe and the linears of a model to one `LinearPlan` a quantized linear, resolved once a run."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from s2q.common.components import full_name, split_name
from s2q.common.errors import InvalidInputError, located, nearest_names
from s2q.core.input_path import InputPath
from s2q.core.packing import weight_bytes
from s2q.core.schemes import LinearScheme, PerGroup, QuantScheme, num_groups
from s2q.models import BlockLinear, block_linears, block_names, family_of, outer_linears
from s2q.ops.int8_attention import MAX_HEAD_DIM
from s2q.recipes.schema import Recipe
from s2q.transforms import ROTATIONS


@dataclass(frozen=True, kw_only=True)
class LinearPlan(BlockLinear):
    """A linear that a run quantizes.

    Attributes:
        scheme: How its weight and input are quantized; where schemes are allocated, the largest until they are.
        path: What is applied to its input.
    """

    scheme: LinearScheme
    path: InputPath = InputPath()

    @property
    def weight_bytes(self) -> int:
        """Bytes of its codes and scales."""
        return weight_bytes(self.scheme.weight, self.out_features, self.in_features)

    @property
    def simulated(self) -> bool:
        """Whether it is computed in floating point, for want of an integer kernel."""
        return self.scheme.simulated or self.path.simulated

    @property
    def needs_grid(self) -> bool:
        """Whether it needs the positions of the video tokens."""
        return self.scheme.needs_grid or self.path.needs_grid


PLANNED_PARTS: dict[str, Callable[[Recipe, LinearPlan], bool | int | None]] = {
    "shift": lambda recipe, plan: recipe.transforms.shift != "none" and plan.has_bias,
    "low_rank": lambda recipe, plan: recipe.transforms.rank(plan.in_features, plan.out_features),
    "deflates": lambda recipe, plan: (
        recipe.transforms.deflates or recipe.transforms.rank(plan.in_features, plan.out_features) is None
    ),
    "activation_clip": lambda recipe, plan: (
        plan.scheme.activation is not None and (recipe.clip.activations or recipe.clip.constant is not None)
    ),
    "estimator": lambda recipe, plan: recipe.transforms.estimator,
}
"""Values of the parts of an input path (`core.input_path.PARTS`) that a recipe gives a linear."""


def recipe_linears(recipe: Recipe, transformers: Mapping[str, nn.Module]) -> list[BlockLinear]:
    """List the linears that a recipe is about: those of the blocks, and the outer ones where it quantizes them."""
    linears = []
    for component, transformer in transformers.items():
        family = family_of(transformer)
        outer = [] if recipe.outer is None else outer_linears(transformer, family)
        for linear in (*block_linears(transformer, family), *outer):
            linears.append(replace(linear, name=full_name(component, linear.name)))
    return linears


def resolve(recipe: Recipe, linears: Sequence[BlockLinear], *, frames: int | None = None) -> list[LinearPlan]:
    """Plan every one of `recipe_linears` that a recipe quantizes, in order; `frames` are token frames, if known.

    A transformer whose blocks are left untouched is left untouched outside them too.
    """
    _check_skip(recipe, linears)
    schemes = {
        "linear": recipe.linear_scheme(),
        "text": recipe.linear_scheme(of_text=True),
        "modulation": recipe.modulation and LinearScheme(weight=recipe.modulation.scheme(), activation=None),
        "outer": recipe.outer and LinearScheme(weight=recipe.outer.scheme(), activation=None),
    }
    transforms = functools.cache(functools.partial(_transforms, recipe))
    plans = []
    for linear in linears:
        scheme = schemes["text" if linear.sees_text else linear.role]
        if scheme is None or _is_skipped(recipe, linear.name):
            continue
        if recipe.allocation is not None and linear.role == "linear":
            *_, scheme = allocation_schemes(recipe, linear).values()
        check_groups(linear, scheme)
        plan = LinearPlan(**vars(linear), scheme=scheme)
        if linear.role == "linear":
            block_size = recipe.transforms.rotation_block(linear.in_features, linear.out_features)
            with located(linear.name):
                parts = transforms(linear.in_features, block_size)
            plan = replace(plan, path=_input_path(recipe, plan, parts, frames))
        plans.append(plan)
    in_blocks = {split_name(plan.name)[0] for plan in plans if plan.role != "outer"}
    plans = [plan for plan in plans if split_name(plan.name)[0] in in_blocks]
    if not plans:
        raise InvalidInputError(
            f"recipe {recipe.name}: none of the {len(linears)} linears is left to quantize; "
            f"skip is {list(recipe.skip)}, remove a pattern"
        )
    if recipe.allocation is not None and (allocated := [plan for plan in plans if plan.role == "linear"]):
        allocation_bytes(recipe, allocated)
    return plans


def quantized_attention(recipe: Recipe, transformers: Mapping[str, nn.Module]) -> list[str]:
    """List the full names of the attention modules that a recipe quantizes: one a block, less `skip`.

    Raises:
        InvalidInputError: If the recipe quantizes attention, and that is linear, the heads are too wide or no module is
            left.
    """
    if recipe.attention is None:
        return []
    names = []
    for component, transformer in transformers.items():
        family = family_of(transformer)
        if family.linear_attention:
            raise InvalidInputError(
                f"recipe {recipe.name}: attention.num_bits={recipe.attention.num_bits}: the attention of "
                f"{type(transformer).__name__} is linear, with no products of queries and keys to quantize; set "
                "attention=null"
            )
        inside = [f"{block}.{family.attention}" for block in block_names(transformer, family)]
        _check_heads(recipe, transformer, inside)
        names += [full_name(component, name) for name in inside]
    left = [name for name in names if not _is_skipped(recipe, name)]
    if not left:
        raise InvalidInputError(
            f"recipe {recipe.name}: attention.num_bits={recipe.attention.num_bits}: no attention is left to quantize; "
            f"skip is {list(recipe.skip)}, remove a pattern, or set attention=null"
        )
    return left


def allocation_schemes(recipe: Recipe, linear: BlockLinear) -> dict[int, LinearScheme]:
    """Return the schemes that a recipe may allocate to a linear, by candidate, smallest in bytes first."""
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
    """Return how many bytes the weights and scales of linears that a recipe allocates to may take together."""
    assert recipe.allocation is not None
    weights = sum(linear.in_features * linear.out_features for linear in linears)
    limit = math.floor(recipe.allocation.budget * weights / 8)
    smallest = 0
    for linear in linears:
        scheme = next(iter(allocation_schemes(recipe, linear).values()))
        smallest += weight_bytes(scheme.weight, linear.out_features, linear.in_features)
    if smallest > limit:
        needed = math.ceil(8 * smallest / weights * 1000) / 1000
        raise InvalidInputError(
            f"recipe {recipe.name}: allocation.budget={recipe.allocation.budget} bits per weight, but the smallest "
            f"candidates of its {len(linears)} linears take {needed} with their scales; set it to at least that"
        )
    return limit


def _check_heads(recipe: Recipe, transformer: nn.Module, attention: Sequence[str]) -> None:
    assert recipe.attention is not None
    modules = [transformer.get_submodule(name) for name in attention]
    sizes = ((getattr(module, "to_q", None) or module.to_query, module) for module in modules)
    head_dim = max(
        query.out_features // (getattr(module, "heads", None) or module.num_heads) for query, module in sizes
    )
    if head_dim > MAX_HEAD_DIM:
        raise InvalidInputError(
            f"recipe {recipe.name}: attention.num_bits={recipe.attention.num_bits}: the heads of "
            f"{type(transformer).__name__} have {head_dim} features; expected at most {MAX_HEAD_DIM}; set "
            "attention=null"
        )


def _is_skipped(recipe: Recipe, name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in recipe.skip)


def _check_skip(recipe: Recipe, linears: Sequence[BlockLinear]) -> None:
    names = [linear.name for linear in linears]
    for pattern in recipe.skip:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = nearest_names(pattern, names, count=1)
            hint = f"; the nearest is {near[0]}" if near else ""
            raise InvalidInputError(f"recipe {recipe.name}: skip pattern {pattern!r} matches none of the linears{hint}")


def check_groups(linear: BlockLinear, scheme: LinearScheme) -> None:
    """Raise InvalidInputError, with the name of the linear, if its groups do not divide the in features."""
    try:
        for side in (scheme.weight, scheme.activation):
            if side is not None:
                num_groups(side, linear.in_features)
    except InvalidInputError as error:
        raise InvalidInputError(f"{linear.name}: {error}") from error


def _input_path(recipe: Recipe, plan: LinearPlan, transforms: InputPath, frames: int | None) -> InputPath:
    parts = {name: value_of(recipe, plan) for name, value_of in PLANNED_PARTS.items()}
    sees_video = not (plan.sees_text or plan.sees_audio)
    return transforms.replace(**parts, estimator_frames=frames if sees_video and parts["estimator"] else None)


def _transforms(recipe: Recipe, in_features: int, block_size: int | None) -> InputPath:
    """The parts that the recipe's scale and rotation have, known by building one."""
    with torch.device("cpu"):
        rotation = ROTATIONS[recipe.transforms.rotation](in_features, seed=0, block_size=block_size)
        tensors = rotation.state_tensors()
    orders = {name: tensor.shape[0] for name, tensor in tensors.items() if name != "scale"}
    scale = "scale" in tensors or recipe.transforms.scale != "none"
    return InputPath(scale=scale, left=orders.get("left"), right=orders.get("right"))


def _grouped(scheme: QuantScheme, size: int) -> QuantScheme:
    grouped = isinstance(scheme.granularity, PerGroup)
    return replace(scheme, granularity=PerGroup(group_size=size)) if grouped else scheme
