"""What a block linear stores beside its codes under a recipe: shift, transform, branch, clip ratio, estimator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from s2q.core.input_path import InputLayout
from s2q.core.schemes import LinearScheme
from s2q.models import BlockLinear
from s2q.recipes.schema import Recipe
from s2q.transforms import ROTATIONS


def assign_layouts(
    recipe: Recipe,
    linears: Sequence[BlockLinear],
    schemes: Mapping[str, LinearScheme],
    *,
    frames: int | None = None,
) -> dict[str, InputLayout]:
    """Give every quantized linear before which something stands its layout.

    Args:
        recipe: The recipe.
        linears: All linears of the blocks.
        schemes: What `assign_schemes` returned for them.
        frames: Token frames of what is calibrated on; None if that is not known.

    Returns:
        Layout by full name; adaLN linears and those with nothing before them do not appear.
    """
    sizes = {one.in_features for one in linears if one.role == "linear" and one.name in schemes}
    transforms = {size: _transform_layout(recipe, size) for size in sizes}
    layouts = {}
    for linear in linears:
        scheme = schemes.get(linear.name)
        if linear.role != "linear" or scheme is None:
            continue
        clip = scheme.activation is not None and (recipe.clip.activations or recipe.clip.constant is not None)
        rank = recipe.transforms.rank(linear.in_features, linear.out_features)
        layout = replace(
            transforms[linear.in_features],
            shift=recipe.transforms.shift != "none" and linear.has_bias,
            low_rank=rank,
            deflates=rank is None or recipe.transforms.deflates,
            activation_clip=clip,
            estimator=recipe.transforms.estimator,
            estimator_frames=frames if recipe.transforms.estimator and not linear.sees_text else None,
        )
        if not layout.empty:
            layouts[linear.name] = layout
    return layouts


def _transform_layout(recipe: Recipe, in_features: int) -> InputLayout:
    """The parts that a transform of the recipe has, found by building one."""
    with torch.device("cpu"):
        tensors = ROTATIONS[recipe.transforms.rotation](in_features, seed=0).state_tensors()
    orders = {name: tensor.shape[0] for name, tensor in tensors.items() if name != "scale"}
    scale = "scale" in tensors or recipe.transforms.scale != "none"
    return InputLayout(scale=scale, left=orders.get("left"), right=orders.get("right"))
