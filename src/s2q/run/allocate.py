"""Allocating: which group size, or how many bits, each linear gets, by what its candidates do to its block.

A few of the calibration samples go through each block with one thing quantized and everything else in full precision:
of group sizes, the linears that share an input, since they share the groups of that input; of bits, the weight of one
linear. What counts is the loss of the block over the power of what it returns: the stream that blocks work on grows
from block to block and each of them normalizes it, so that errors matter in proportion. Those of different linears are
taken to add up. The choice with the smallest sum within the budget is then found (`s2q.run.budget`).

Weights are rounded to nearest for this, behind the recipe's transforms as they start: what GPTQ or distillation will
make of a candidate is not known here.
"""

import copy
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch

from s2q.blocks.distil import block_loss
from s2q.blocks.quantize_block import block_fingerprint
from s2q.blocks.reconstruct import BlockStudents, block_students
from s2q.blocks.students import put_students
from s2q.blocks.task import Group, block_task, input_groups
from s2q.calibration.calibration_set import CalibrationSet, CalibrationSets
from s2q.calibration.samples import BlockSamples
from s2q.calibration.stream import TeacherStream
from s2q.calibration.teacher import TeacherTransformer
from s2q.common.errors import S2QError, located, memory_errors
from s2q.common.files import canonical_json
from s2q.common.progress import Progress, StageCounter, silent
from s2q.common.records import ALLOCATION_VERSION
from s2q.common.run_folder import Artefact, ArtefactFolder
from s2q.common.seeds import derive_seed
from s2q.core.schemes import LinearScheme
from s2q.distillation.loss import weighted_token_loss
from s2q.engines.engine import Engine, Worker
from s2q.nn import replace_module
from s2q.planning import LESS_MEMORY
from s2q.planning.resolve import LinearPlan, allocation_bytes, allocation_schemes
from s2q.recipes.schema import Recipe
from s2q.run.budget import choose
from s2q.run.runner import BlockRunner
from s2q.run.work import Place, RunnerWork, TeacherSource

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """All linears of the run with the schemes that they were given, and the content of allocation.json."""

    linears: tuple[LinearPlan, ...]
    record: Mapping[str, Any]

    @property
    def files(self) -> dict[str, bytes]:
        """The files of s2q/ that show the allocation, by name."""
        return {"allocation.json": canonical_json(dict(self.record)).encode()}


class AllocationWork(RunnerWork):
    """Measures the candidates of blocks, on the samples of the job."""

    def __call__(self, place: Place, worker: Worker) -> None:
        """Measure a block, unless its measurements are in the run folder."""
        runner = self.runner(worker)
        transformer = self.transformer(place[0])
        stream, selected = runner.stream_of(transformer), runner.job.selected
        assert stream is not None
        assert selected is not None
        block_errors(transformer, runner.job.recipe, place[1], stream=stream, folder=runner.folder, selected=selected)
        runner.teacher.page_out(transformer.module.get_submodule(transformer.block_names[place[1]]))


def allocate(runner: BlockRunner, engine: Engine, source: TeacherSource, *, progress: Progress = silent) -> Allocation:
    """Measure the candidates on every block that the folder has no measurement of, and choose."""
    teacher, recipe, selected = runner.teacher, runner.job.recipe, runner.job.selected
    assert recipe.allocation is not None
    assert selected is not None
    samples = _some_of(selected, recipe.allocation.samples)
    places = [(part.component, index) for part in teacher.transformers for index in range(len(part.block_names))]
    block_done = StageCounter(progress, "allocate", len(places))
    work = AllocationWork(teacher=source, job=replace(runner.job, selected=samples), folder=runner.folder.path)
    with closing(engine.map(work, places)) as results:
        for _ in results:
            block_done()
    errors: dict[Group, list[float]] = {}
    for transformer in teacher.transformers:
        stream = runner.stream(transformer, samples)
        for index in range(len(transformer.block_names)):
            errors |= block_errors(transformer, recipe, index, stream=stream, folder=runner.folder, selected=samples)
    return chosen_schemes(recipe, teacher.linears, errors)


def chosen_schemes(
    recipe: Recipe, linears: Sequence[LinearPlan], errors: Mapping[Group, Sequence[float]]
) -> Allocation:
    """Choose the candidates with the smallest sum of errors (see `block_errors`) under the budget."""
    group = recipe.allocation
    assert group is not None
    limit = allocation_bytes(recipe, [linear for unit in errors for linear in unit])
    candidates = [
        [
            (value, scheme, _weight_bytes(unit, scheme), error)
            for (value, scheme), error in zip(allocation_schemes(recipe, unit[0]).items(), losses, strict=True)
        ]
        for unit, losses in errors.items()
    ]
    taken = choose([[(size, error) for _, _, size, error in options] for options in candidates], limit)
    given, rows, spent = {}, [], 0
    for unit, options, index in zip(errors, candidates, taken, strict=True):
        names = [linear.name for linear in unit]
        chosen, scheme, num_bytes, _ = options[index]
        given |= dict.fromkeys(names, scheme)
        spent += num_bytes
        listed = [{"value": value, "bytes": size, "error": error} for value, _, size, error in options]
        rows.append({"linears": names, "given": chosen, "candidates": listed})
    counts = Counter(row["given"] for row in rows for _ in row["linears"])
    summary = ", ".join(f"{value} to {count}" for value, count in sorted(counts.items()))
    logger.info("allocated %s: %s linears", group.what, summary)
    record = {
        "schema_version": ALLOCATION_VERSION,
        "what": group.what,
        "budget": group.budget,
        "most_bytes": limit,
        "bytes": spent,
        "linears": {str(value): count for value, count in sorted(counts.items())},
        "units": rows,
    }
    changed = tuple(replace(linear, scheme=given.get(linear.name, linear.scheme)) for linear in linears)
    return Allocation(linears=changed, record=record)


def _weight_bytes(linears: Group, scheme: LinearScheme) -> int:
    return sum(replace(linear, scheme=scheme).weight_bytes for linear in linears)


def _some_of(selected: CalibrationSets, count: int) -> CalibrationSets:
    """As many of the samples of each transformer, at random."""

    def some(component: str) -> CalibrationSet:
        samples = selected.samples[component]
        generator = torch.Generator().manual_seed(derive_seed(selected.inputs.seed, "allocation", component))
        order = torch.randperm(len(samples.calls), generator=generator)[:count].tolist()
        return replace(samples, calls=tuple(samples.calls[index] for index in sorted(order)), timesteps=())

    return replace(selected, samples={component: some(component) for component in selected.samples})


def block_errors(
    transformer: TeacherTransformer,
    recipe: Recipe,
    index: int,
    *,
    stream: TeacherStream,
    folder: ArtefactFolder,
    selected: CalibrationSets,
) -> dict[Group, list[float]]:
    """Return the errors of one block, in the order of `allocation_schemes`, by the linears that get the same.

    They are kept in the folder. The stream is moved to the block where they have to be measured.
    """
    units = _units(recipe, input_groups(transformer.linears_of(index), transformer.family))
    if not units:
        return {}
    key = f"allocation-{transformer.artefact_name(index)}"
    task = block_task(transformer, index, recipe, seed=selected.inputs.seed, device=stream.device, stream=stream)
    fingerprint = block_fingerprint(task, stage="allocate", samples=selected.fingerprint(transformer.component))
    if not folder.has(key, fingerprint):
        doing = f"measuring candidates of {task.name} on {stream.device}"
        with memory_errors(doing, remedy=LESS_MEMORY), located(task.name), block_students(task) as opened:
            power, tensors = _power(opened.samples) or 1.0, {}
            for unit, group in units.items():
                losses = candidate_losses(opened, group, unit, allocation_schemes(recipe, unit[0]))
                errors = torch.tensor(losses, dtype=torch.float64) / power
                if not bool(torch.isfinite(errors).all()):
                    raise S2QError(f"{unit[0].name}: a candidate's loss is not finite; check the activations")
                tensors[unit[0].inner_name] = errors
        folder.save(key, fingerprint, Artefact(tensors=tensors, stats={}))
    measured = folder.load(key).tensors
    return {unit: measured[unit[0].inner_name].tolist() for unit in units}


def _units(recipe: Recipe, groups: Sequence[Group]) -> dict[Group, Group]:
    """Units of allocation, each with its group of linears that share an input."""
    assert recipe.allocation is not None
    if recipe.allocation.what == "group_size":
        return {group: group for group in groups}
    return {(linear,): group for group in groups for linear in group}


@torch.no_grad()
def candidate_losses(
    opened: BlockStudents, group: Group, unit: Group, schemes: Mapping[int, LinearScheme]
) -> list[float]:
    """Return the loss of a block with some of its linears quantized by one scheme after another.

    Args:
        unit: Those of them to quantize; inputs too where that is all of them and the candidates differ in it.
    """
    work = opened.work
    shared = {id(tensor): tensor for tensor in (*work.teacher.parameters(), *work.teacher.buffers())}
    student = copy.deepcopy(work.teacher, shared)
    alike = len({scheme.activation for scheme in schemes.values()}) == 1
    losses = []
    for scheme in schemes.values():
        candidate = replace(scheme, activation=None) if alike else scheme
        changed = tuple(replace(linear, scheme=candidate) for linear in group)
        put_students(student, work, changed, opened.statistics[group])
        for linear in set(group) - set(unit):
            replace_module(student, linear.inner_name, work.teacher.get_submodule(linear.inner_name))
        losses.append(block_loss(student, opened.samples))
    return losses


def _power(samples: BlockSamples) -> float:
    """The loss of a block that returns zero."""
    losses = []
    for index in range(len(samples)):
        sample = samples[index]
        nothing = [torch.zeros_like(output) for output in sample.outputs]
        losses.append(float(weighted_token_loss(nothing, sample.outputs, weights=sample.weights)))
    return math.fsum(losses) / len(losses)
