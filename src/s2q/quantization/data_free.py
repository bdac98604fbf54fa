"""One block without samples: fixed transforms folded into its weights, then rounding to nearest, linear by linear.

All of it depends on the weights and the seed alone. The students are those of calibration, so that a part does the same
with samples and without.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from s2q.core.schemes import LinearScheme
from s2q.nn import PackedLinear
from s2q.quantization.calibrated import BlockCalibration
from s2q.quantization.pack import pack_student
from s2q.quantization.students import make_students
from s2q.quantization.work import BlockWork, input_groups
from s2q.recipes import Recipe
from s2q.rounding import ROUNDINGS


@torch.no_grad()
def fold_block(
    block: nn.Module,
    linears: Mapping[str, str],
    *,
    schemes: Mapping[str, LinearScheme],
    recipe: Recipe,
    calibration: BlockCalibration,
    device: str = "cpu",
) -> dict[str, PackedLinear]:
    """Carry out a recipe that needs no samples on one block.

    Args:
        block: The full-precision block; not changed.
        linears: Full name by name inside the block, of the linears to quantize.
        schemes: Scheme by full name.
        recipe: A recipe that does not calibrate.
        calibration: Which block it is.
        device: Where to compute.

    Returns:
        Packed linear, on the CPU, by full name.
    """
    work = BlockWork(block=block, teacher=block, linears=linears, schemes=schemes, recipe=recipe)
    layers: dict[str, PackedLinear] = {}
    modulation = dict(linears)
    for group in input_groups(linears, calibration.family):
        for name, student in make_students(work, group, seed=calibration.block_seed).items():
            layers[modulation.pop(name)] = pack_student(student.to(device), work, name).to("cpu")
    return layers | round_block(block, modulation, schemes=schemes, method="rtn", device=device)


@torch.no_grad()
def round_block(
    block: nn.Module,
    linears: Mapping[str, str],
    *,
    schemes: Mapping[str, LinearScheme],
    method: str,
    device: str = "cpu",
) -> dict[str, PackedLinear]:
    """Round and pack linears by a method that needs no samples.

    Args:
        block: The block, or any module that has them; not changed.
        linears: Full name by name inside it.
        schemes: Scheme by full name.
        method: One of `ROUNDINGS`.
        device: Where to compute.
    """
    layers: dict[str, PackedLinear] = {}
    rounding = ROUNDINGS[method]
    for inner, name in linears.items():
        linear = block.get_submodule(inner)
        rounded = rounding(linear.weight.to(device), schemes[name].weight)
        layers[name] = PackedLinear.from_rounded(rounded, bias=linear.bias, scheme=schemes[name]).to("cpu")
    return layers
