"""One block to quantize: what decides the result, and what every step of it knows."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2q.calibration.stream import TeacherStream
from s2q.calibration.teacher import TeacherTransformer
from s2q.common.devices import has_bf16_products
from s2q.common.progress import Tick
from s2q.common.seeds import derive_seed
from s2q.core.memo import PIECE
from s2q.models import Family
from s2q.nn import replace_module
from s2q.planning.resolve import LinearPlan
from s2q.recipes.schema import Recipe


@dataclass(frozen=True, kw_only=True)
class BlockTask:
    """One block to quantize.

    Attributes:
        block: The full-precision block as it is stored; never changed.
        seed: Seed of the run; the block's own is derived from it and the index.
        stream: The teacher's stream; is moved to the block. None for recipes that need no samples.
        dtype: That the block is calibrated in, as planned; None is that of the recipe on the device.
        checkpointed: Whether a step of distillation computes parts of the block again to hold less.
        piece: Tokens at a time that what treats each token by itself then computes, and that are added to a Hessian.
        mean_row: Mean input of the modulation linears [in_features], which corrects their biases; None for none.
        progress: Called after each unit of calibration: an epoch, or what takes about as long.
    """

    block: nn.Module
    linears: tuple[LinearPlan, ...]
    recipe: Recipe
    family: Family
    index: int
    seed: int
    device: str = "cpu"
    stream: TeacherStream | None = None
    checkpointed: bool = False
    dtype: torch.dtype | None = None
    piece: int = PIECE
    mean_row: Tensor | None = None
    progress: Tick = lambda: None

    @property
    def name(self) -> str:
        """Full name of the block; empty where it has no linear to quantize."""
        linear = next(iter(self.linears), None)
        return "" if linear is None else linear.name.removesuffix(f".{linear.inner_name}")

    @property
    def calibration_dtype(self) -> torch.dtype:
        """The dtype that the block is calibrated in."""
        own = next(self.block.parameters()).dtype
        return self.dtype or self.recipe.calibration_dtype(own, bf16_products=has_bf16_products(self.device))

    @property
    def block_seed(self) -> int:
        """The block's own seed."""
        return derive_seed(self.seed, "block", self.index)


@dataclass(frozen=True, kw_only=True)
class BlockWork:
    """A block that is being quantized.

    Attributes:
        task: The block and what is to be done with it.
        teacher: A copy of the block on the device, in the dtype of calibration, or the block itself; never changed.
    """

    task: BlockTask
    teacher: nn.Module

    def copy_with(self, layers: Mapping[str, nn.Module]) -> nn.Module:
        """Return a copy of the teacher with some of its linears replaced, by their names inside the block."""
        result = copy.deepcopy(self.teacher)
        for name, layer in layers.items():
            replace_module(result, name, layer)
        return result


def block_task(
    transformer: TeacherTransformer, block: int, recipe: Recipe, *, seed: int, device: str, stream: TeacherStream | None
) -> BlockTask:
    """Return the task of a block of a transformer, by its index; see `BlockTask`."""
    return BlockTask(
        block=transformer.module.get_submodule(transformer.block_names[block]),
        linears=transformer.linears_of(block),
        recipe=recipe,
        family=transformer.family,
        index=block,
        seed=seed,
        device=device,
        stream=stream,
        mean_row=transformer.mean_row if recipe.corrects_biases else None,
    )


Group = tuple[LinearPlan, ...]
"""Linears of a block that share an input."""


def input_groups(linears: Sequence[LinearPlan], family: Family) -> list[Group]:
    """Group the linears of a block, except modulation, by shared input; a linear that shares none is a group alone."""
    inside = {linear.inner_name: linear for linear in linears if linear.role == "linear"}
    sharing = {name: names for names in family.shared_inputs for name in names}
    groups = dict.fromkeys(sharing.get(name, (name,)) for name in inside)
    return [tuple(inside[name] for name in names if name in inside) for names in groups]
