"""Time estimate of a run from a slice of it: one prompt, few steps, and one block of each kind, scaled up.

The slice runs the code of the run itself on the model at hand. What calibrating a block takes is linear in what it
does, so that four short runs tell the parts:

    t(S, E) = fixed + S · (once + E · step + n(E) · evaluation)

Legend: `S` samples, `E` epochs, n(E) how often distillation looks at all samples.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from s2q.blocks.distil import evaluations
from s2q.blocks.quantize_block import quantize_block
from s2q.blocks.task import BlockTask, block_task
from s2q.calibration.calibration_set import CalibrationSets, select
from s2q.calibration.candidates import branches_of, calibration_prompts, collect, prepare
from s2q.calibration.stream import TeacherStream, calibration_stream
from s2q.calibration.teacher import Teacher, TeacherTransformer, load_teacher
from s2q.common.errors import InvalidInputError
from s2q.common.progress import Progress, StageCounter, silent
from s2q.common.run_folder import RunFolder, open_run_folder
from s2q.generation.sharing import steps_of_transformers
from s2q.models import ModelSource
from s2q.planning import Machine, Plan
from s2q.recipes.schema import Recipe
from s2q.run.allocate import block_errors
from s2q.selection.scores import CandidatePool

_CALLS = (1, 5)
_SAMPLES, _MORE_SAMPLES = 2, 4
_EPOCHS = (1, 5, 10)
_PROMPT = "red"


@dataclass(frozen=True, kw_only=True)
class BlockSeconds:
    """Parts of the seconds of one kind of block; see the module."""

    fixed: float
    once: float
    step: float = 0.0
    evaluation: float = 0.0

    def total(self, samples: int, epochs: int) -> float:
        """Return the seconds of a block; without distillation, epochs are 0."""
        return self.fixed + samples * (self.once + epochs * self.step + evaluations(epochs) * self.evaluation)


def measured(
    planned: Plan,
    source: ModelSource,
    recipe: Recipe,
    *,
    machine: Machine,
    prompts: Sequence[str] | None = None,
    dtype: Any = None,
    progress: Progress = silent,
) -> Plan:
    """Return a plan with the seconds of its stages, measured on a slice of the run; assembling is not measured.

    The first prompt is generated; None takes those of an embedded model, or any, as many as the recipe needs.
    """
    teacher = load_teacher(source, recipe, dtype=dtype, device=machine.device)
    with tempfile.TemporaryDirectory() as scratch, open_run_folder(Path(scratch) / "measure") as folder:
        if recipe.calibrates:
            any_prompts = None if source.kind == "embedded" else [_PROMPT] * recipe.calibration.n_prompts
            texts = prompts or any_prompts
            seconds = _calibrating(teacher, recipe, planned, folder, texts, machine=machine, progress=progress)
        else:
            seconds = {"blocks": _rounding(teacher, recipe, machine, progress)}
    stages = [replace(stage, seconds=seconds.get(stage.name)) for stage in planned.stages]
    return replace(planned, stages=tuple(stages))


def _calibrating(
    teacher: Teacher,
    recipe: Recipe,
    planned: Plan,
    folder: RunFolder,
    prompts: Sequence[str] | None,
    *,
    machine: Machine,
    progress: Progress,
) -> dict[str, float]:
    group = recipe.calibration
    wanted = calibration_prompts(teacher.name, prompts, group, recipe=recipe.name)
    few = replace(group, n_prompts=1, samples=1)
    number = prepare(teacher, wanted[:1], few, seed=0, inputs={}).settings.num_inference_steps
    short, long = (_steps_with(teacher, calls) for calls in _CALLS)
    taken: list[float] = []
    for seed, steps in enumerate((short, short, long)):  # the first one warms up
        inputs = prepare(teacher, wanted[:1], replace(few, steps=steps), seed=seed, inputs={})
        started = time.perf_counter()
        pools = collect(teacher, inputs, folder, device=machine.device, progress=progress)
        taken.append(time.perf_counter() - started)
    step = max(0.0, (taken[2] - taken[1]) / (long - short))
    video = max(0.0, taken[1] - step * short) + step * number
    branches = branches_of(folder, inputs)
    slices = {
        samples: select(pools, inputs, replace(group, samples=samples), branches=branches)
        for samples in (_SAMPLES, _MORE_SAMPLES)
    }
    whole = _whole_pools(teacher, pools, prompts=len(wanted), steps=number)
    started = time.perf_counter()
    select(whole, inputs, group, branches=branches)
    selecting = time.perf_counter() - started
    allocates = {}
    if recipe.allocation is not None:
        allocates["allocate"] = _allocating(teacher, recipe, planned, folder, slices[_SAMPLES], machine=machine)
    return {
        "collect": len(wanted) * video,
        "select": selecting,
        **allocates,
        "blocks": _blocks(teacher, recipe, planned, folder, slices, machine=machine, progress=progress),
    }


def _steps_with(teacher: Teacher, calls: int) -> int:
    """The fewest denoising steps in which every transformer is called so often."""
    limit = int(teacher.pipe.scheduler.config.num_train_timesteps)
    for steps in range(calls, limit + 1):
        shared = steps_of_transformers(teacher.pipe, steps)
        if all(shared[one.component] >= calls for one in teacher.transformers):
            return steps
    raise InvalidInputError(
        f"{teacher.name}: a transformer is called fewer than {calls} times in {limit} steps, too rarely to measure it; "
        "omit --measure"
    )


def _whole_pools(
    teacher: Teacher, pools: Mapping[str, CandidatePool], *, prompts: int, steps: int
) -> dict[str, CandidatePool]:
    """Pools as large as those of the run, of the candidates that there are over and over."""
    shared = steps_of_transformers(teacher.pipe, steps)
    return {
        component: CandidatePool(
            candidates=tuple(
                replace(pool.candidates[step % len(pool)], prompt=prompt, step=step)
                for prompt in range(prompts)
                for step in range(shared[component])
            )
        )
        for component, pool in pools.items()
    }


def _allocating(
    teacher: Teacher, recipe: Recipe, planned: Plan, folder: RunFolder, few: CalibrationSets, *, machine: Machine
) -> float:
    cost, group = planned.calibration, recipe.allocation
    assert cost is not None
    assert group is not None
    total = 0.0
    for one in teacher.transformers:
        for first, count in _kinds(one):
            stream = calibration_stream(
                teacher, one, few, folder, recipe=recipe, machine=machine, step_bytes=cost.step_bytes
            )
            stream.advance(first)
            started = time.perf_counter()
            block_errors(one, recipe, first, stream=stream, folder=folder, selected=few)
            each = (time.perf_counter() - started) / len(few.samples[one.component].calls)
            stream.close()
            total += count * each * min(group.samples, cost.samples)
    return total


def _blocks(
    teacher: Teacher,
    recipe: Recipe,
    planned: Plan,
    folder: RunFolder,
    slices: Mapping[int, CalibrationSets],
    *,
    machine: Machine,
    progress: Progress,
) -> float:
    cost = planned.calibration
    assert cost is not None
    epochs = 0 if recipe.distillation is None else recipe.distillation.epochs
    cases = [(_SAMPLES, one) for one in (_EPOCHS if epochs else (0,))] + [(_MORE_SAMPLES, _EPOCHS[0] if epochs else 0)]
    kinds = [(one, *kind) for one in teacher.transformers for kind in _kinds(one)]
    total = 0.0
    case_done = StageCounter(progress, "blocks", len(kinds) * len(cases))
    for one, first, count in kinds:
        taken = {}
        for samples, number in cases:
            stream = calibration_stream(
                teacher, one, slices[samples], folder, recipe=recipe, machine=machine, step_bytes=cost.step_bytes
            )
            stream.advance(first)
            taken[samples, number] = _block_seconds(
                one, recipe, stream, first, epochs=number, checkpointed=cost.gradient_checkpointing
            )
            stream.close()
            case_done()
        calls = len(slices[_SAMPLES].samples[one.component].calls) // _SAMPLES  # of a candidate: one or both branches
        total += count * _parts(taken, distils=epochs > 0).total(cost.samples // calls, epochs)
    return total


def _parts(taken: dict[tuple[int, int], float], *, distils: bool) -> BlockSeconds:
    """Solve for the parts; what noise makes negative is 0."""
    few, more = _SAMPLES, _MORE_SAMPLES
    start = _EPOCHS[0] if distils else 0
    each = max(0.0, (taken[more, start] - taken[few, start]) / (more - few))
    fixed = max(0.0, taken[few, start] - few * each)
    if not distils:
        return BlockSeconds(fixed=fixed, once=each)
    short, long = _EPOCHS[1:]
    looks = {number: evaluations(number) for number in _EPOCHS}
    assert looks[short] == looks[long]
    step = max(0.0, (taken[few, long] - taken[few, short]) / (few * (long - short)))
    rest = (taken[few, short] - taken[few, start]) / few - (short - start) * step
    evaluation = max(0.0, rest / (looks[short] - looks[start]))
    once = max(0.0, each - start * step - looks[start] * evaluation)
    return BlockSeconds(fixed=fixed, once=once, step=step, evaluation=evaluation)


def _block_seconds(
    transformer: TeacherTransformer,
    recipe: Recipe,
    stream: TeacherStream,
    index: int,
    *,
    epochs: int,
    checkpointed: bool,
) -> float:
    distillation = None if recipe.distillation is None else replace(recipe.distillation, epochs=epochs)
    changed = recipe.model_copy(update={"distillation": distillation})
    task = block_task(transformer, index, changed, seed=0, device=stream.device, stream=stream)
    return _seconds(replace(task, checkpointed=checkpointed))


def _rounding(teacher: Teacher, recipe: Recipe, machine: Machine, progress: Progress) -> float:
    kinds = [(one, *kind) for one in teacher.transformers for kind in _kinds(one)]
    total = 0.0
    block_done = StageCounter(progress, "blocks", len(kinds))
    for one, first, count in kinds:
        total += count * _seconds(block_task(one, first, recipe, seed=0, device=machine.device, stream=None))
        block_done()
    return total


def _seconds(task: BlockTask) -> float:
    started = time.perf_counter()
    quantize_block(task)
    return time.perf_counter() - started


def _kinds(transformer: TeacherTransformer) -> list[tuple[int, int]]:
    """The index of the first block of each class, and how many there are of it."""
    classes = [type(transformer.module.get_submodule(name)) for name in transformer.block_names]
    return [(classes.index(one), classes.count(one)) for one in dict.fromkeys(classes)]
