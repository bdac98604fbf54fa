"""One block with calibration: token importance, initial transforms, distillation, rounding, packing.

Everything is computed from the block's weights and the inputs that the teacher's stream gives it, in fp32 unless the
recipe or the GPU asks for another dtype; the targets are what a copy of the block in that dtype makes of
these inputs. On a GPU, fp32 products of passes and Hessians are in TF32. The student contains the modulation
linears of the checkpoint.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from s2q.blocks.distil import DistillationReport, block_loss, checkpoint_parts, distil
from s2q.blocks.pack import pack_modulation, pack_nearest, pack_students
from s2q.blocks.students import learns_transforms, put_students, round_transforms
from s2q.blocks.task import BlockTask, BlockWork, Group, input_groups
from s2q.calibration.input_statistics import InputStatistics
from s2q.calibration.observe import observe
from s2q.calibration.samples import BlockSamples
from s2q.common.errors import S2QError
from s2q.common.fp32_modules import convert, kept_in_fp32
from s2q.common.memory import to_device
from s2q.common.seeds import derive_seed
from s2q.common.torch_state import tf32_products
from s2q.distillation.attention_profile import AttentionProfile
from s2q.distillation.options import Distillation, Refinement
from s2q.nn import LearnableClip, PackedLinear, RefinedLinear, replace_module
from s2q.planning.resolve import LinearPlan
from s2q.rounding import AdaRound, Rounding, penalize, roundings_of
from s2q.transforms import batch_factors


@dataclass(frozen=True, kw_only=True)
class ReconstructedBlock:
    """A block after calibration.

    Attributes:
        layers: Packed linear by name inside the block.
        loss: Mean weighted loss over the samples: `rtn` (rounded to nearest, nothing before the linears), `initial`
            (transforms as they start), `distilled` (the best state, rounded to nearest unless that is learned),
            `rounded` and `refined` (before and after refinement), and `final` (as packed).
        distillation: Its report; None without distillation.
        refinement: Its report; None without refinement.
        rounding: The report of GPTQ or of learned rounding by full name; empty without.
        attention: `AttentionProfile` of the full-precision block as plain data; None where the recipe does not weight
            tokens by it.
    """

    layers: Mapping[str, PackedLinear]
    loss: Mapping[str, float]
    distillation: Mapping[str, Any] | None
    refinement: Mapping[str, Any] | None
    rounding: Mapping[str, Mapping[str, Any]]
    attention: Mapping[str, Any] | None


def reconstruct_block(task: BlockTask) -> ReconstructedBlock:
    """Carry out a recipe that calibrates on one block."""
    with block_students(task) as opened:
        task.progress()
        return _carry_out(opened)


@dataclass(frozen=True, kw_only=True)
class BlockStudents:
    """A block with its observed samples, ready to be quantized.

    Attributes:
        work: The block and the recipe.
        samples: Its inputs, what the teacher makes of them, and the weights of the tokens.
        statistics: Of the input of each group of linears that share one; modulation linears are in none.
        attention: How the block's attention is spread over tokens; None where the recipe does not use it.
    """

    work: BlockWork
    samples: BlockSamples
    statistics: Mapping[Group, InputStatistics]
    attention: AttentionProfile | None

    @property
    def modulation(self) -> list[LinearPlan]:
        """The modulation linears, which have no students."""
        return [linear for linear in self.work.task.linears if linear.role == "modulation"]

    def nearest(self, linears: Iterable[LinearPlan]) -> dict[str, PackedLinear]:
        """Return linears rounded to nearest, without an input path, by name inside the block."""
        return pack_nearest(self.work.task.block, linears, device=self.work.task.device)

    def student(self, modulation: Mapping[str, PackedLinear]) -> nn.Module:
        """Return the student as it starts; the statistics are released.

        Its modulation linears do not learn: they are dequantized once.
        """
        dtype = next(self.work.teacher.parameters()).dtype
        student = self.work.copy_with({name: layer.dequantized_linear(dtype) for name, layer in modulation.items()})
        for group, statistics in self.statistics.items():
            put_students(student, self.work, group, statistics)
            statistics.release()
        batch_factors(student)
        return student


@contextmanager
def block_students(task: BlockTask) -> Iterator[BlockStudents]:
    """Move the stream to a block and observe its samples; targets and token weights are deleted at the end."""
    stream, family = task.stream, task.family
    assert stream is not None, "a recipe that calibrates needs samples"
    teacher = copy.deepcopy(task.block).to(task.device).requires_grad_(False).eval()
    dtype = None
    if task.recipe.calibration.precision != "model":
        dtype = task.calibration_dtype
        convert(teacher, dtype, kept=kept_in_fp32(stream.transformer))
    cast = functools.partial(_on_device, device=task.device, dtype=dtype)
    stream.advance(task.index)
    groups = input_groups(task.linears, family)
    targets = stream.store("targets")
    samples = BlockSamples(stream, targets, cast)
    work = BlockWork(task=task, teacher=teacher)
    try:
        with tf32_products(task.device):
            observed = observe(teacher, samples, groups, recipe=task.recipe, family=family)
        yield BlockStudents(work=work, samples=samples, statistics=observed.statistics, attention=observed.attention)
    finally:
        targets.clear()


def _on_device(arguments: Mapping[str, Any], *, device: str, dtype: torch.dtype | None) -> dict[str, Any]:
    """Return arguments of a block on a device, in a dtype if one is given; angles of rotary embeddings are in fp32."""
    angles = None if dtype is None else torch.float32
    return {
        name: to_device(value, device, dtype=dtype if isinstance(value, Tensor) else angles)
        for name, value in arguments.items()
    }


def _carry_out(opened: BlockStudents) -> ReconstructedBlock:
    """The steps of a block after its targets are known."""
    work, samples = opened.work, opened.samples
    task, recipe = work.task, work.task.recipe
    nearest = opened.nearest(task.linears)
    measured = functools.partial(_finite_loss, samples=samples, task=task)
    loss = {"rtn": measured(work.copy_with(nearest))}
    modulation = {linear.inner_name: nearest[linear.inner_name] for linear in opened.modulation}
    reports: dict[str, dict[str, Any]] = {}
    if recipe.modulation_rounding.needs_hessian:
        modulation, reports = pack_modulation(work, opened.modulation, samples)
    student = opened.student(modulation)
    loss["initial"] = measured(student)
    report = None
    if recipe.distillation is not None:
        seed, penalty = derive_seed(task.block_seed, "order"), rounding_penalty(student, recipe.rounding)
        learn = functools.partial(_learn, seed=seed, initial=loss["initial"], penalty=penalty)
        report = learn(student, samples, task, recipe.distillation)
        loss["distilled"] = report.loss
    if learns_transforms(recipe):
        for group in opened.statistics:
            round_transforms(student, group)
    student.requires_grad_(False)
    packed, rounding = pack_students(student, work, samples, list(opened.statistics))
    reports |= rounding
    refinement = None
    if recipe.refinement is not None:
        loss["rounded"] = measured(work.copy_with(packed | modulation))
        packed, refinement = _refine(student, packed, samples, task)
        loss["refined"] = refinement.loss
    packed |= modulation
    loss["final"] = measured(work.copy_with(packed))
    task.progress()
    return ReconstructedBlock(
        layers={name: layer.to("cpu") for name, layer in packed.items()},
        loss=loss,
        distillation=None if report is None else asdict(report),
        refinement=None if refinement is None else asdict(refinement),
        rounding={linear.name: reports[linear.inner_name] for linear in task.linears if linear.inner_name in reports},
        attention=None if opened.attention is None else opened.attention.to_dict(),
    )


def _finite_loss(block: nn.Module, samples: BlockSamples, task: BlockTask) -> float:
    """The loss of a block, refused where it is not a number that a report can have."""
    with tf32_products(task.device), checkpoint_parts(block, piece=task.piece, enabled=task.checkpointed):
        loss = block_loss(block, samples, temporal=task.recipe.loss.temporal)
    if not math.isfinite(loss):
        raise S2QError(f"its loss is {loss}: the squares of what it returns overflow; check the model's activations")
    return loss


def _learn(
    student: nn.Module,
    samples: BlockSamples,
    task: BlockTask,
    options: Distillation | Refinement,
    *,
    seed: int,
    initial: float | None = None,
    penalty: Callable[[float], None] = lambda progress: None,
) -> DistillationReport:
    """Distil a student; its parts are computed again in the backward pass of a checkpointed task."""
    temporal = task.recipe.loss.temporal
    parts = checkpoint_parts(student, piece=task.piece, enabled=task.checkpointed)
    with tf32_products(task.device), parts:
        return distil(
            student,
            samples,
            options=options,
            temporal=temporal,
            seed=seed,
            initial=initial,
            penalty=penalty,
            epoch_done=task.progress,
        )


def rounding_penalty(student: nn.Module, rounding: Rounding) -> Callable[[float], None]:
    """Return what adds the gradient of the rounding penalty, by the fraction of steps completed."""
    if not isinstance(rounding, AdaRound):
        return lambda progress: None
    return functools.partial(penalize, roundings_of(student), options=rounding)


def _refine(
    student: nn.Module, packed: Mapping[str, PackedLinear], samples: BlockSamples, task: BlockTask
) -> tuple[dict[str, PackedLinear], DistillationReport]:
    """Learn what scales and corrects the codes of a block; the student is used up."""
    options = task.recipe.refinement
    assert options is not None
    layers = {name: RefinedLinear(layer, source=student.get_submodule(name).source) for name, layer in packed.items()}
    for name, layer in layers.items():
        replace_module(student, name, layer)
        if isinstance(layer.source.clip, LearnableClip):
            layer.source.clip.requires_grad_(True)
    report = _learn(student, samples, task, options, seed=derive_seed(task.seed, "refinement", task.index))
    return {name: layer.repacked() for name, layer in layers.items()}, report
