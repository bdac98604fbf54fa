"""One block without samples: fixed transforms folded into its weights, then rounding to nearest, linear by linear.

All of it depends on the weights and the seed alone. The students are those of calibration, so that a part does the same
with samples and without.
"""

import torch

from s2q.blocks.pack import pack_group, pack_nearest
from s2q.blocks.students import make_students
from s2q.blocks.task import BlockTask, BlockWork, input_groups
from s2q.nn import PackedLinear


def fold_block(task: BlockTask) -> dict[str, PackedLinear]:
    """Carry out a recipe that needs no samples; return packed linears, on the CPU, by name inside the block."""
    return {name: layer.to("cpu") for name, layer in folded(task).items()}


@torch.no_grad()
def folded(task: BlockTask) -> dict[str, PackedLinear]:
    """Fold and round the linears of a task, which may be some of a block's: all that read an input, or none of them.

    Returns:
        Packed linears on the task's device, by name inside the block.
    """
    work = BlockWork(task=task, teacher=task.block)
    layers: dict[str, PackedLinear] = {}
    for group in input_groups(task.linears, task.family):
        for linear, student in zip(group, make_students(work, group), strict=True):
            packed, _ = pack_group([student.to(task.device)], work, (linear,))
            layers |= packed
    modulation = [linear for linear in task.linears if linear.role == "modulation"]
    return layers | pack_nearest(task.block, modulation, device=task.device, mean_input=task.mean_row)
