"""Time estimate of a run from a slice of it: one prompt, few steps, and one block of each kind, scaled up.

The slice runs the code of the run itself on the model at hand. What calibrating a block takes is linear in what it
does, so that four short runs tell the parts:

    t(S, E) = fixed + S · (once + E · step + n(E) · evaluation)

Legend: `S` samples, `E` epochs, n(E) how often distillation looks at all samples.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from s2q.blocks.quantize_block import quantize_block
from s2q.blocks.task import BlockTask, block_task
from s2q.calibration.calibration_set import CalibrationSets, select
from s2q.calibration.candidates import (
    branches_of,
    calibration_prompts,
    chosen_steps,
    prepare,
    record_prompt,
    score_candidates,
)
from s2q.calibration.teacher import Teacher, TeacherTransformer, load_teacher
from s2q.common.errors import InvalidInputError
from s2q.common.progress import Progress, StageCounter, silent
from s2q.common.run_folder import open_run_folder
from s2q.common.temporaries import scratch_folder
from s2q.distillation.options import evaluations
from s2q.generation.conditioning import any_prompt
from s2q.generation.offload import pipeline_on_device
from s2q.generation.settings import GenerationSettings
from s2q.generation.sharing import steps_of_transformers
from s2q.models import ModelSource
from s2q.planning import Machine, Plan
from s2q.recipes.schema import Recipe
from s2q.run.allocate import block_errors
from s2q.run.plan import rounds_of
from s2q.run.runner import BlockJob, BlockRunner
from s2q.selection.known import recorded_by_round
from s2q.selection.scores import CandidatePool

_CALLS = (1, 5)
_SAMPLES, _MORE_SAMPLES = 2, 4
_EPOCHS = (1, 5, 10)


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
    with scratch_folder("measure") as scratch, open_run_folder(scratch / "measure") as folder:
        if recipe.calibrates:
            embedded = source.kind == "embedded"
            any_prompts = None if embedded else [any_prompt(teacher.pipe)] * recipe.calibration.n_prompts
            texts = prompts or any_prompts
            job = BlockJob(
                recipe=recipe,
                selected=None,
                cost=planned.calibration,
                machine=machine,
                seed=0,
                offload=planned.offload or "none",
            )
            seconds = _calibrating(BlockRunner(folder, teacher, job), texts, progress)
        else:
            seconds = {"blocks": _rounding(teacher, recipe, machine.device, progress)}
    stages = [replace(stage, seconds=seconds.get(stage.name)) for stage in planned.stages]
    return replace(planned, stages=tuple(stages))


def _calibrating(runner: BlockRunner, prompts: Sequence[str] | None, progress: Progress) -> dict[str, float]:
    teacher, recipe, device = runner.teacher, runner.job.recipe, runner.job.machine.device
    group = recipe.calibration
    wanted = calibration_prompts(teacher.name, prompts, group, recipe=recipe.name)
    shortest = replace(group, n_prompts=1, samples=1, selection="sds")  # which records every step
    settings = prepare(teacher, wanted[:1], shortest, seed=0, inputs={}).settings
    number = settings.num_inference_steps
    short, long = (_steps_with(teacher, settings, calls) for calls in _CALLS)
    taken: list[float] = []
    for seed, steps in enumerate((short, short, long)):  # the first one warms up
        inputs = prepare(teacher, wanted[:1], replace(shortest, steps=steps), seed=seed, inputs={})
        started = time.perf_counter()
        step_done = StageCounter(progress, "collect", steps)
        with pipeline_on_device(teacher.pipe, device, offload=runner.job.offload, mapped=teacher.mapped):
            record_prompt(teacher, inputs, runner.folder, 0, step_done=step_done)
        pools = score_candidates(teacher, inputs, runner.folder)
        taken.append(time.perf_counter() - started)
    step = max(0.0, (taken[2] - taken[1]) / (long - short))
    chosen = chosen_steps(teacher, group, settings, prompts=len(wanted), seed=0)
    called, apart = steps_of_transformers(teacher.pipe, settings), len(rounds_of(teacher, recipe)) > 1
    rounds = recorded_by_round(chosen, called, prompts=len(wanted), apart=apart)
    recorded = [steps for prompts_of_round in rounds.values() for steps in prompts_of_round]
    videos = max(0.0, taken[1] - step * short) * sum(map(bool, recorded)) + step * sum(recorded)
    branches = branches_of(runner.folder, inputs)
    slices = {
        samples: select(pools, inputs, replace(group, samples=samples), branches=branches)
        for samples in (_SAMPLES, _MORE_SAMPLES)
    }
    whole = _whole_pools(teacher, settings, pools, prompts=len(wanted))
    started = time.perf_counter()
    select(whole, replace(inputs, steps=(number,) * len(wanted)), group, branches=branches)
    selecting = time.perf_counter() - started
    allocates = {} if recipe.allocation is None else {"allocate": _allocating(runner, slices[_SAMPLES])}
    return {
        "collect": videos,
        "select": selecting,
        **allocates,
        "blocks": _blocks(runner, slices, progress),
    }


def _steps_with(teacher: Teacher, settings: GenerationSettings, calls: int) -> int:
    """The fewest denoising steps in which every transformer is called so often."""
    limit = int(teacher.pipe.scheduler.config.get("num_train_timesteps") or settings.num_inference_steps)
    for steps in range(calls, limit + 1):
        shared = steps_of_transformers(teacher.pipe, replace(settings, num_inference_steps=steps))
        if all(shared[transformer.component] >= calls for transformer in teacher.transformers):
            return steps
    raise InvalidInputError(
        f"{teacher.name}: a transformer is called fewer than {calls} times in {limit} steps, too rarely to measure it; "
        "omit --measure"
    )


def _whole_pools(
    teacher: Teacher, settings: GenerationSettings, pools: Mapping[str, CandidatePool], *, prompts: int
) -> dict[str, CandidatePool]:
    """Pools as large as those of the run, of repeated candidates."""
    shared = steps_of_transformers(teacher.pipe, settings)
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


def _allocating(runner: BlockRunner, selected: CalibrationSets) -> float:
    cost, group = runner.job.cost, runner.job.recipe.allocation
    assert cost is not None
    assert group is not None
    total = 0.0
    for transformer, first, count in _kinds(runner.teacher):
        stream = runner.stream(transformer, selected)
        stream.advance(first)
        started = time.perf_counter()
        block_errors(transformer, runner.job.recipe, first, stream=stream, folder=runner.folder, selected=selected)
        each = (time.perf_counter() - started) / len(selected.samples[transformer.component].calls)
        stream.close()
        total += count * each * min(group.samples, cost.samples)
    return total


def _blocks(runner: BlockRunner, slices: Mapping[int, CalibrationSets], progress: Progress) -> float:
    cost, distillation = runner.job.cost, runner.job.recipe.distillation
    assert cost is not None
    start, *longer = (0,) if distillation is None else _EPOCHS
    cases = [(_SAMPLES, start), *((_SAMPLES, epochs) for epochs in longer), (_MORE_SAMPLES, start)]
    kinds = _kinds(runner.teacher)
    total = 0.0
    case_done = StageCounter(progress, "blocks", len(kinds) * len(cases))
    for transformer, first, count in kinds:
        taken = {}
        for samples, epochs in cases:
            stream = runner.stream(transformer, slices[samples])
            stream.advance(first)
            changed = None if distillation is None else replace(distillation, epochs=epochs)
            recipe = runner.job.recipe.model_copy(update={"distillation": changed})
            task = block_task(transformer, first, recipe, seed=0, device=stream.device, stream=stream)
            planned = {"checkpointed": cost.gradient_checkpointing, "dtype": cost.torch_dtype}
            taken[samples, epochs] = _seconds(replace(task, **planned))
            stream.close()
            case_done()
        calls = (
            len(slices[_SAMPLES].samples[transformer.component].calls) // _SAMPLES
        )  # a candidate: 1 or both branches
        parts = _parts(taken, distils=distillation is not None)
        total += count * parts.total(cost.samples // calls, 0 if distillation is None else distillation.epochs)
    return total


def _parts(taken: dict[tuple[int, int], float], *, distils: bool) -> BlockSeconds:
    """Solve for the parts; what noise makes negative is 0."""
    fewer, more = _SAMPLES, _MORE_SAMPLES
    start = _EPOCHS[0] if distils else 0
    each = max(0.0, (taken[more, start] - taken[fewer, start]) / (more - fewer))
    fixed = max(0.0, taken[fewer, start] - fewer * each)
    if not distils:
        return BlockSeconds(fixed=fixed, once=each)
    short, long = _EPOCHS[1:]
    looks = {number: evaluations(number) for number in _EPOCHS}
    assert looks[short] == looks[long]
    step = max(0.0, (taken[fewer, long] - taken[fewer, short]) / (fewer * (long - short)))
    rest = (taken[fewer, short] - taken[fewer, start]) / fewer - (short - start) * step
    evaluation = max(0.0, rest / (looks[short] - looks[start]))
    once = max(0.0, each - start * step - looks[start] * evaluation)
    return BlockSeconds(fixed=fixed, once=once, step=step, evaluation=evaluation)


def _rounding(teacher: Teacher, recipe: Recipe, device: str, progress: Progress) -> float:
    kinds = _kinds(teacher)
    total = 0.0
    block_done = StageCounter(progress, "blocks", len(kinds))
    for transformer, first, count in kinds:
        total += count * _seconds(block_task(transformer, first, recipe, seed=0, device=device, stream=None))
        block_done()
    return total


def _seconds(task: BlockTask) -> float:
    started = time.perf_counter()
    quantize_block(task)
    return time.perf_counter() - started


def _kinds(teacher: Teacher) -> list[tuple[TeacherTransformer, int, int]]:
    """The index of the first block of each class of a transformer, and how many blocks there are of it."""
    kinds = []
    for transformer in teacher.transformers:
        classes = [type(transformer.module.get_submodule(name)) for name in transformer.block_names]
        kinds += [(transformer, classes.index(kind), classes.count(kind)) for kind in dict.fromkeys(classes)]
    return kinds
