"""The work of a run that its engine distributes: recording prompts, measuring candidates, quantizing blocks.

A worker loads the model once and reads what tasks share (recorded calls, the measurements of an allocation) from the
run folder, into which it writes what it finishes. In this process the loaded model is used.
"""

from __future__ import annotations

import secrets
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from s2q.calibration.candidates import CalibrationInputs, missing_prompts, record_prompt
from s2q.calibration.teacher import Teacher, TeacherTransformer, load_teacher
from s2q.common.errors import memory_errors
from s2q.common.memory import Offload, keep_freed_memory
from s2q.common.progress import Progress, StageCounter
from s2q.common.run_folder import ArtefactFolder
from s2q.engines.engine import Engine, Worker
from s2q.generation.offload import pipeline_on_device
from s2q.models import ModelSource
from s2q.planning import LESS_MEMORY
from s2q.planning.resolve import LinearPlan
from s2q.recipes.schema import Recipe
from s2q.run.assemble import with_students
from s2q.run.runner import BlockJob, BlockRunner

TEACHER = "teacher"
"""Name under which workers keep the loaded model."""

SPILLED = "process-"
"""Start of the names of files with activations that a worker's memory has no room for."""


@dataclass(frozen=True, kw_only=True)
class TeacherSource:
    """The full-precision model as workers load it; `source` is None for a pipeline that was given loaded."""

    source: ModelSource | None
    recipe: Recipe
    dtype: torch.dtype | str | None
    linears: list[LinearPlan]

    def on(self, worker: Worker) -> Teacher:
        """Return the teacher of a worker."""
        return worker.keep(TEACHER, lambda: self._load(worker.device)).with_linears(self.linears)

    def _load(self, device: str) -> Teacher:
        assert self.source is not None, "a loaded pipeline is offered to the engine"
        return load_teacher(self.source, self.recipe, dtype=self.dtype, device=device, linears=self.linears)


@dataclass(kw_only=True)
class PromptWork:
    """Records the prompts of a calibration, all in one stay of the pipeline, or of what computes, on the device.

    Attributes:
        quantized: Transformers, by component, that are quantized already and generate with their packed linears.
    """

    teacher: TeacherSource
    inputs: CalibrationInputs
    folder: Path
    offload: Offload
    quantized: tuple[str, ...] = ()
    _stay: ExitStack | None = None
    _teacher: Teacher | None = None

    def __call__(self, prompt: int, worker: Worker) -> None:
        """Record a prompt, by its index; tells None after each step."""
        folder = ArtefactFolder(self.folder)
        with memory_errors(f"collecting candidates on {worker.device}", remedy=LESS_MEMORY):
            teacher = self._teacher = self._teacher or self._generator(worker, folder)
            if self._stay is None:
                self._stay = ExitStack()
                self._stay.enter_context(
                    pipeline_on_device(teacher.pipe, worker.device, offload=self.offload, mapped=teacher.mapped)
                )
            record_prompt(teacher, self.inputs, folder, prompt, step_done=lambda: worker.tell(None))

    def _generator(self, worker: Worker, folder: ArtefactFolder) -> Teacher:
        teacher = self.teacher.on(worker)
        if not self.quantized:
            return teacher
        transformers = [part for part in teacher.transformers if part.component in self.quantized]
        return replace(teacher, pipe=with_students(teacher.pipe, transformers, folder, recipe=self.teacher.recipe))

    def close(self) -> None:
        """Take the pipeline from the device."""
        self._teacher = None
        if self._stay is not None:
            self._stay.close()


def record_prompts(
    engine: Engine,
    source: TeacherSource,
    inputs: CalibrationInputs,
    folder: ArtefactFolder,
    *,
    offload: Offload = "none",
    quantized: tuple[str, ...] = (),
    progress: Progress,
) -> None:
    """Record the prompts whose calls are not in the folder; see `PromptWork`."""
    missing, total = missing_prompts(inputs, folder), sum(inputs.steps)
    done = total - sum(inputs.steps[prompt] for prompt in missing)
    step_done = StageCounter(progress, "collect", total, done=done)
    work = PromptWork(teacher=source, inputs=inputs, folder=folder.path, offload=offload, quantized=quantized)
    with closing(engine.map(work, missing, on_message=lambda _: step_done())) as results:
        for _ in results:
            pass


Place = tuple[str, int]
"""A block: the component of its transformer, and its index there."""


@dataclass(kw_only=True)
class RunnerWork:
    """Work on blocks, with a runner of its own in each worker."""

    teacher: TeacherSource
    job: BlockJob
    folder: Path
    _runner: BlockRunner | None = None

    def runner(self, worker: Worker) -> BlockRunner:
        """Return the runner of a worker."""
        if self._runner is None:
            keep_freed_memory()
            job = replace(self.job, machine=replace(self.job.machine, device=worker.device))
            spilled = f"{SPILLED}{secrets.token_hex(4)}-"
            self._runner = BlockRunner(ArtefactFolder(self.folder), self.teacher.on(worker), job, spilled=spilled)
        return self._runner

    def transformer(self, component: str) -> TeacherTransformer:
        """Return a transformer of the teacher."""
        assert self._runner is not None
        return self._runner.teacher.transformer(component)

    def close(self) -> None:
        """Remove activations from the disk."""
        if self._runner is not None:
            self._runner.close()


class BlockWork(RunnerWork):
    """Quantizes blocks."""

    def __call__(self, place: Place, worker: Worker) -> str:
        """Quantize a block; tells its place after each unit, returns the fingerprint of the result."""
        runner = self.runner(worker)
        return runner.quantize(self.transformer(place[0]), place[1], unit_done=lambda: worker.tell(place))
