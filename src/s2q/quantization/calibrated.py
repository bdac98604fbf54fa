"""One block with calibration: token importance, initial transforms, distillation, rounding, packing.

Everything is computed from the block's weights and the inputs that the teacher's stream gives it, in fp32 unless the
recipe asks for the model's own dtype; the targets are what a copy of the block in that dtype makes of these inputs.
Modulation linears stand in the student as they will be in the checkpoint.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from s2q.core.placement import moved
from s2q.core.schemes import LinearScheme
from s2q.core.seeds import derive_seed
from s2q.distillation import DistillationOptions, block_loss, checkpointed, distil
from s2q.models import Family
from s2q.nn import PackedLinear
from s2q.quantization.observation import BlockSamples, observe
from s2q.quantization.pack import pack_modulation, pack_nearest, pack_students
from s2q.quantization.statistics import InputStatistics
from s2q.quantization.stream import TeacherStream
from s2q.quantization.students import put_students
from s2q.quantization.work import BlockWork
from s2q.recipes import Recipe
from s2q.recipes.schema import GPTQ


@dataclass(frozen=True, kw_only=True)
class BlockCalibration:
    """What a block is calibrated with.

    Attributes:
        stream: The teacher's stream; is moved to the block.
        index: Index of the block.
        family: Family of the model.
        seed: Seed of the run; the block's own is derived from it and the index.
        progress: Called after each unit of work: an epoch, or what takes about as long.
        checkpointed: Whether a step of distillation computes parts of the block again to hold less.
    """

    stream: TeacherStream
    index: int
    family: Family
    seed: int
    progress: Callable[[], None] = lambda: None
    checkpointed: bool = False


@dataclass(frozen=True, kw_only=True)
class CalibratedBlock:
    """What came of it.

    Attributes:
        layers: Packed linear by full name.
        loss: Mean weighted loss over the samples: `rtn` (rounded to nearest, nothing before the linears), `initial`
            (transforms as they start), `distilled` (the best state, still rounded to nearest) and `final` (as packed).
        distillation: Its report; None without distillation.
        rounding: GPTQ's report by full name; empty without it.
    """

    layers: Mapping[str, PackedLinear]
    loss: Mapping[str, float]
    distillation: Mapping[str, Any] | None
    rounding: Mapping[str, Mapping[str, Any]]


def calibrate_block(
    block: nn.Module,
    linears: Mapping[str, str],
    *,
    schemes: Mapping[str, LinearScheme],
    recipe: Recipe,
    calibration: BlockCalibration,
    device: str = "cpu",
) -> CalibratedBlock:
    """Carry out the recipe on one block.

    Args:
        block: The full-precision block; not changed.
        linears: Full name by name inside the block, of the linears to quantize.
        schemes: Scheme by full name.
        recipe: A recipe that calibrates.
        calibration: What to calibrate with.
        device: Where to compute.

    Returns:
        The packed linears and what was measured.

    Raises:
        InvalidInputError: If the activations hold NaN or infinite values.
        S2QError: If GPTQ fails and the recipe does not allow the fallback.
    """
    with opened_block(block, linears, schemes=schemes, recipe=recipe, calibration=calibration, device=device) as opened:
        calibration.progress()
        return _carry_out(opened, calibration)


@dataclass(frozen=True, kw_only=True)
class OpenedBlock:
    """A block whose samples have been looked at.

    Attributes:
        work: The block and the recipe.
        samples: Its inputs, what the teacher makes of them, and the weights of the tokens.
        groups: Names inside the block of linears that share an input; those of modulation are in none.
        statistics: Of the input of each group, by the first name of the group.
        seed: The block's own.
    """

    work: BlockWork
    samples: BlockSamples
    groups: Sequence[tuple[str, ...]]
    statistics: Mapping[str, InputStatistics]
    seed: int

    def put_students(self, block: nn.Module, group: tuple[str, ...], schemes: Mapping[str, LinearScheme]) -> None:
        """Replace linears that share an input by students as the recipe starts them, in place.

        Args:
            block: A copy of the teacher.
            group: One of `groups`.
            schemes: Scheme by full name.
        """
        work = replace(self.work, schemes=schemes)
        seed = derive_seed(self.seed, "rotation", group[0])
        put_students(block, work, group, self.statistics[group[0]], seed=seed)


@contextmanager
def opened_block(
    block: nn.Module,
    linears: Mapping[str, str],
    *,
    schemes: Mapping[str, LinearScheme],
    recipe: Recipe,
    calibration: BlockCalibration,
    device: str = "cpu",
) -> Iterator[OpenedBlock]:
    """Move the stream to a block and look at its samples; what is kept of them goes at the end.

    Args:
        block: The full-precision block; not changed.
        linears: Full name by name inside the block, of the linears to quantize.
        schemes: Scheme by full name.
        recipe: A recipe that calibrates.
        calibration: What to calibrate with.
        device: Where to compute.

    Yields:
        What was seen.

    Raises:
        InvalidInputError: If the activations hold NaN or infinite values.
    """
    teacher = copy.deepcopy(block).to(device).requires_grad_(False).eval()
    wide = recipe.calibration.precision == "float32"
    cast = functools.partial(moved, device=device, dtype=torch.float32 if wide else None)
    if wide:
        teacher = teacher.float()
    calibration.stream.advance(calibration.index)
    groups = input_groups(linears, calibration.family)
    targets = calibration.stream.store("targets")
    samples = BlockSamples(calibration.stream, targets, calibration.family.streams, cast)
    work = BlockWork(block=block, teacher=teacher, linears=linears, schemes=schemes, recipe=recipe)
    check = functools.partial(_check_outputs, calibration)
    try:
        statistics = observe(teacher, samples, groups, recipe=recipe, family=calibration.family, check=check)
        seed = derive_seed(calibration.seed, "block", calibration.index)
        yield OpenedBlock(work=work, samples=samples, groups=groups, statistics=statistics, seed=seed)
    finally:
        targets.clear()


def _check_outputs(calibration: BlockCalibration, outputs: Sequence[torch.Tensor], sample: int) -> None:
    calibration.stream.check(outputs, block=calibration.index, sample=sample)


def _carry_out(opened: OpenedBlock, calibration: BlockCalibration) -> CalibratedBlock:
    """The steps of a block after its targets are known."""
    work, samples, groups = opened.work, opened.samples, opened.groups
    recipe = work.recipe
    grouped = {name for group in groups for name in group}
    nearest = {name: pack_nearest(work, name) for name in work.linears}
    loss = {"rtn": block_loss(work.copy_with(nearest), samples)}
    modulation = {name: layer for name, layer in nearest.items() if name not in grouped}
    reports: dict[str, dict[str, Any]] = {}
    if recipe.modulation is not None and recipe.modulation.rounding == GPTQ:
        modulation, reports = pack_modulation(work, list(modulation), samples)
    student = work.copy_with(modulation)
    for group in groups:
        opened.put_students(student, group, work.schemes)
    loss["initial"] = block_loss(student, samples)
    report = None
    if recipe.distillation is not None:
        options = DistillationOptions(**recipe.distillation.model_dump())
        with checkpointed(student) if calibration.checkpointed else nullcontext():
            report = distil(
                student,
                samples,
                options=options,
                seed=derive_seed(opened.seed, "order"),
                epoch_done=calibration.progress,
            )
        loss["distilled"] = report.loss
    student.requires_grad_(False)
    packed, rounding = pack_students(student, work, samples, groups)
    packed |= modulation
    reports |= rounding
    loss["final"] = block_loss(work.copy_with(packed), samples)
    calibration.progress()
    return CalibratedBlock(
        layers={work.linears[name]: packed[name].to("cpu") for name in work.linears},
        loss=loss,
        distillation=None if report is None else asdict(report),
        rounding={work.linears[name]: one for name, one in reports.items()},
    )


def input_groups(linears: Mapping[str, str], family: Family) -> list[tuple[str, ...]]:
    """The linears to quantize but for modulation, by shared input; one that shares nothing is alone."""
    groups = [tuple(name for name in group if name in linears) for group in family.shared_inputs]
    shared = {name for group in groups for name in group}
    groups += [(name,) for name in linears if name not in shared and name not in family.modulation]
    return [group for group in groups if group]
