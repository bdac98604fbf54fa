"""One block without samples: fixed transforms folded into its weights, then rounding to nearest, linear by linear.

All of it depends on the weights and the seed alone. The students are those of calibration, so that a part does the same
with samples and without.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from s2q.blocks.pack import pack_nearest, pack_student
from s2q.blocks.students import make_students
from s2q.blocks.task import BlockTask, BlockWork, input_groups
from s2q.core.schemes import LinearScheme
from s2q.nn import PackedLinear


@torch.no_grad()
def fold_block(task: BlockTask) -> dict[str, PackedLinear]:
    """Carry out a recipe that needs no samples on one block.

    Args:
        task: The block and the recipe.

    Returns:
        Packed linear, on the CPU, by full name.
    """
    work = BlockWork(task=task, teacher=task.block)
    layers: dict[str, PackedLinear] = {}
    modulation = dict(task.linears)
    for group in input_groups(task.linears, task.family):
        for name, student in make_students(work, group).items():
            layers[modulation.pop(name)] = pack_student(student.to(task.device), work, name).to("cpu")
    return layers | round_linears(task.block, modulation, task.schemes, device=task.device)


@torch.no_grad()
def round_linears(
    module: nn.Module, linears: Mapping[str, str], schemes: Mapping[str, LinearScheme], *, device: str = "cpu"
) -> dict[str, PackedLinear]:
    """Round linears to nearest and pack them, nothing before them.

    Args:
        module: What has them; not changed.
        linears: Full name by name inside it.
        schemes: Scheme by full name.
        device: Where to compute.

    Returns:
        Packed linear, on the CPU, by full name.
    """
    layers: dict[str, PackedLinear] = {}
    for inner, name in linears.items():
        linear = module.get_submodule(inner)
        layers[name] = pack_nearest(linear.weight.to(device), linear.bias, schemes[name]).to("cpu")
    return layers
