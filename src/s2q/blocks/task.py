"""One block to quantize: what decides the result, and what every step of it knows."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from s2q.calibration.stream import TeacherStream
from s2q.calibration.teacher import TeacherTransformer
from s2q.common.progress import Tick
from s2q.common.seeds import derive_seed
from s2q.core.schemes import LinearScheme
from s2q.models import Family
from s2q.nn import replace_module
from s2q.recipes.schema import Recipe


@dataclass(frozen=True, kw_only=True)
class BlockTask:
    """One block to quantize.

    Attributes:
        block: The full-precision block as it is stored; never changed.
        linears: Full name by name inside the block, of the linears to quantize.
        schemes: Scheme by full name.
        recipe: The recipe.
        family: Family of the model.
        index: Index of the block.
        seed: Seed of the run; the block's own is derived from it and the index.
        device: Where to compute.
        stream: The teacher's stream; is moved to the block. None for recipes that need no samples.
        checkpointed: Whether a step of distillation computes parts of the block again to hold less.
        progress: Called after each unit of calibration: an epoch, or what takes about as long.
    """

    block: nn.Module
    linears: Mapping[str, str]
    schemes: Mapping[str, LinearScheme]
    recipe: Recipe
    family: Family
    index: int
    seed: int
    device: str = "cpu"
    stream: TeacherStream | None = None
    checkpointed: bool = False
    progress: Tick = lambda: None

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
        frames: Token frames of the samples; None if no layer has to know.
    """

    task: BlockTask
    teacher: nn.Module
    frames: int | None = None

    def scheme(self, name: str) -> LinearScheme:
        """Return the scheme of a linear.

        Args:
            name: Its name inside the block.
        """
        return self.task.schemes[self.task.linears[name]]

    def copy_with(self, layers: Mapping[str, nn.Module]) -> nn.Module:
        """Return a copy of the teacher with some of its linears replaced.

        Args:
            layers: Replacement by name inside the block.
        """
        result = copy.deepcopy(self.teacher)
        for name, layer in layers.items():
            replace_module(result, name, layer)
        return result


def block_task(
    transformer: TeacherTransformer, block: int, recipe: Recipe, *, seed: int, device: str, stream: TeacherStream | None
) -> BlockTask:
    """Return what is to be done with a block of a transformer.

    Args:
        transformer: The transformer.
        block: Index of the block.
        recipe: The recipe.
        seed: Seed of the run.
        device: Where to compute.
        stream: The stream of the samples; None for recipes that need none.
    """
    linears = transformer.inner_names(block)
    return BlockTask(
        block=transformer.module.get_submodule(transformer.block_names[block]),
        linears=linears,
        schemes={full: transformer.schemes[full] for full in linears.values()},
        recipe=recipe,
        family=transformer.family,
        index=block,
        seed=seed,
        device=device,
        stream=stream,
    )


def input_groups(linears: Iterable[str], family: Family) -> list[tuple[str, ...]]:
    """Return the linears to quantize except modulation, by shared input; one that shares nothing is alone.

    Args:
        linears: Their names inside the block.
        family: Of the model.
    """
    names = list(linears)
    groups = [tuple(name for name in group if name in names) for group in family.shared_inputs]
    shared = {name for group in groups for name in group}
    groups += [(name,) for name in names if name not in shared and name not in family.modulation]
    return [group for group in groups if group]
