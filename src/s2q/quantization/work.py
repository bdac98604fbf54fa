"""What every step of a block's quantization knows: the block, its linears, their schemes and the recipe."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from s2q.core.schemes import LinearScheme
from s2q.models import Family
from s2q.nn import replace_module
from s2q.recipes import Recipe


@dataclass(frozen=True, kw_only=True)
class BlockWork:
    """A block to quantize.

    Attributes:
        block: The full-precision block as it is stored; never changed.
        teacher: A copy of it on the device, in the dtype of calibration, or the block itself; never changed.
        linears: Full name by name inside the block, of the linears to quantize.
        schemes: Scheme by full name.
        recipe: The recipe.
        text_linears: Names inside the block of the linears that see text tokens alone.
        frames: Token frames of the samples; None if no layer has to know.
    """

    block: nn.Module
    teacher: nn.Module
    linears: Mapping[str, str]
    schemes: Mapping[str, LinearScheme]
    recipe: Recipe
    text_linears: tuple[str, ...] = ()
    frames: int | None = None

    def scheme(self, name: str) -> LinearScheme:
        """Return the scheme of a linear.

        Args:
            name: Its name inside the block.
        """
        return self.schemes[self.linears[name]]

    def copy_with(self, layers: Mapping[str, nn.Module]) -> nn.Module:
        """Return a copy of the teacher with some of its linears replaced.

        Args:
            layers: Replacement by name inside the block.
        """
        result = copy.deepcopy(self.teacher)
        for name, layer in layers.items():
            replace_module(result, name, layer)
        return result


def input_groups(linears: Iterable[str], family: Family) -> list[tuple[str, ...]]:
    """Return the linears to quantize but for modulation, by shared input; one that shares nothing is alone.

    Args:
        linears: Their names inside the block.
        family: Of the model.
    """
    names = list(linears)
    groups = [tuple(name for name in group if name in names) for group in family.shared_inputs]
    shared = {name for group in groups for name in group}
    groups += [(name,) for name in names if name not in shared and name not in family.modulation]
    return [group for group in groups if group]
