"""One block without samples: fixed transforms folded into its weights, then rounding to nearest, linear by linear.

All of it depends on the weights and the seed alone. The students are those of calibration, so that a part does the same
with samples and without.
"""

from collections.abc import Sequence

import torch
from torch import nn

from s2q.blocks.pack import pack_nearest, pack_student
from s2q.blocks.students import make_students
from s2q.blocks.task import BlockTask, BlockWork, input_groups
from s2q.nn import PackedLinear
from s2q.planning.resolve import LinearPlan


@torch.no_grad()
def fold_block(task: BlockTask) -> dict[str, PackedLinear]:
    """Carry out a recipe that needs no samples; return packed linears, on the CPU, by name inside the block."""
    work = BlockWork(task=task, teacher=task.block)
    layers: dict[str, PackedLinear] = {}
    for group in input_groups(task.linears, task.family):
        for linear, student in zip(group, make_students(work, group), strict=True):
            layer, _ = pack_student(student.to(task.device), work, linear)
            layers[linear.inner_name] = layer.to("cpu")
    modulation = [linear for linear in task.linears if linear.role == "modulation"]
    return layers | round_linears(task.block, modulation, device=task.device)


@torch.no_grad()
def round_linears(module: nn.Module, linears: Sequence[LinearPlan], *, device: str = "cpu") -> dict[str, PackedLinear]:
    """Round linears of a block, or outside the blocks, to nearest, without an input path; return them by inner name."""
    layers: dict[str, PackedLinear] = {}
    for linear in linears:
        dense = module.get_submodule(linear.inner_name)
        layers[linear.inner_name] = pack_nearest(dense.weight.to(device), dense.bias, linear.scheme).to("cpu")
    return layers
