"""Quantizing the blocks of a teacher into its run folder, one by one, in this process or in several.

Blocks do not depend on each other, so a block is the same wherever it is quantized. Processes write what they finish
into the run folder; the run then finds it there, as it finds what an interrupted run finished.
"""

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from s2q.blocks.quantize_block import block_fingerprint, quantize_block, to_artefact
from s2q.blocks.task import BlockTask, block_task
from s2q.calibration.artefacts import CalibrationCall, call_inputs
from s2q.calibration.calibration_set import CalibrationSets
from s2q.calibration.stream import TeacherStream
from s2q.calibration.teacher import Teacher, TeacherTransformer, load_teacher
from s2q.common.devices import peak_memory_bytes
from s2q.common.progress import Progress, Tick
from s2q.common.run_folder import ArtefactFolder
from s2q.common.tensor_store import HostMemory
from s2q.engines.processes import ProcessEngine, Tell, devices_of
from s2q.models import ModelSource
from s2q.planning import CalibrationCost, Machine, activation_memory
from s2q.planning.resolve import LinearPlan
from s2q.recipes.schema import Recipe

_SPILLED = "process-"


@dataclass(frozen=True, kw_only=True)
class BlockJob:
    """Data shared by all blocks of a run; `selected` and `cost` are None for recipes that do not calibrate."""

    recipe: Recipe
    selected: CalibrationSets | None
    cost: CalibrationCost | None
    machine: Machine
    seed: int

    @property
    def units(self) -> int:
        """Units of a block's calibration: an epoch, or what takes about as long."""
        return 1 if self.selected is None else 2 + self.recipe.epochs


class BlockRunner:
    """Quantizes blocks of a teacher, in the order in which they run, into a run folder.

    Files of activations that host memory has no room for begin with `spilled`.
    """

    def __init__(self, folder: ArtefactFolder, teacher: Teacher, job: BlockJob, *, spilled: str = "") -> None:
        self.folder, self.teacher, self.job, self.spilled = folder, teacher, job, spilled
        self._stream: tuple[str, TeacherStream] | None = None

    def stream(self, transformer: TeacherTransformer, selected: CalibrationSets) -> TeacherStream:
        """Make the stream that carries samples through the blocks of a transformer."""
        job, family, samples = self.job, transformer.family, selected.samples[transformer.component]
        assert job.cost is not None

        def builder(call: CalibrationCall) -> Callable[[], dict[str, Any]]:
            return lambda: call_inputs(self.folder.load(selected.inputs.key(call.prompt)), call)

        timesteps = samples.timesteps if job.recipe.modulation_rounding.needs_hessian and family.modulation else ()
        return TeacherStream(
            transformer.module,
            transformer.block_names,
            calls=[builder(call) for call in samples.calls],
            names=[call.name for call in samples.calls],
            steps=[call.step for call in samples.calls],
            timesteps=[builder(call) for call in timesteps],
            streams=family.streams,
            folder=self.folder.path,
            device=job.machine.device,
            memory=HostMemory(activation_memory(job.machine, job.cost.step_bytes)),
            page_out=self.teacher.page_out,
            component=transformer.component,
            tokens=transformer.tokens,
            prefix=self.spilled,
        )

    def is_finished(self, transformer: TeacherTransformer, index: int) -> bool:
        """Tell whether the result of a block is in the run folder."""
        fingerprint = self._fingerprint(transformer, self._task(transformer, index, None))
        return self.folder.has(transformer.artefact_name(index), fingerprint)

    def quantize(self, transformer: TeacherTransformer, index: int, *, unit_done: Tick) -> bool:
        """Quantize a block, unless its result is in the run folder; return whether it was there."""
        started = time.perf_counter()
        task = replace(self._task(transformer, index, self._stream_of(transformer)), progress=unit_done)
        key, fingerprint = transformer.artefact_name(index), self._fingerprint(transformer, task)
        is_there = self.folder.has(key, fingerprint)
        if not is_there:
            result = quantize_block(task)
            seconds, peak = time.perf_counter() - started, peak_memory_bytes(self.job.machine.device)
            self.folder.save(key, fingerprint, to_artefact(result, seconds=seconds, peak_memory_bytes=peak))
        self.teacher.page_out(task.block)
        return is_there

    def close(self) -> None:
        """Remove activations from the disk; they are of no use later."""
        if self._stream is not None:
            self._stream[1].close()
            self._stream = None

    def _stream_of(self, transformer: TeacherTransformer) -> TeacherStream | None:
        """The stream of the transformer at hand, None without samples."""
        if self.job.selected is None:
            return None
        if self._stream is None or self._stream[0] != transformer.component:
            self.close()
            self._stream = transformer.component, self.stream(transformer, self.job.selected)
        return self._stream[1]

    def _task(self, transformer: TeacherTransformer, index: int, stream: TeacherStream | None) -> BlockTask:
        job = self.job
        task = block_task(transformer, index, job.recipe, seed=job.seed, device=job.machine.device, stream=stream)
        return replace(task, checkpointed=job.cost is not None and job.cost.gradient_checkpointing)

    def _fingerprint(self, transformer: TeacherTransformer, task: BlockTask) -> str:
        selected = self.job.selected
        samples = None if selected is None else selected.fingerprint(transformer.component)
        return block_fingerprint(task, samples=samples)


def quantize_in_processes(
    runner: BlockRunner, source: ModelSource, *, dtype: torch.dtype | str | None, processes: int, progress: Progress
) -> set[str]:
    """Quantize the blocks whose results are not in the run folder yet, in several processes; return their names.

    The processes share the memory for activations, and the GPUs that "cuda" means.
    """
    teacher, job = runner.teacher, runner.job
    left = [
        (transformer, index)
        for transformer in teacher.transformers
        for index in range(len(transformer.block_names))
        if not runner.is_finished(transformer, index)
    ]
    todo = [(transformer.component, index) for transformer, index in left]
    if not todo:
        return set()
    total = job.units * teacher.block_count
    left_units = dict.fromkeys(todo, job.units)

    def unit_done(place: tuple[str, int]) -> None:
        left_units[place] = max(0, left_units[place] - 1)
        progress("blocks", total - sum(left_units.values()), total)

    machine = replace(job.machine, memory_budget=job.machine.memory_budget // processes)
    job, folder = replace(job, machine=machine), runner.folder.path
    work = _BlockWork(source=source, dtype=dtype, job=job, folder=folder, linears=teacher.linears)
    devices = devices_of(job.machine.device, min(processes, len(todo)))
    progress("blocks", total - sum(left_units.values()), total)
    try:
        with contextlib.closing(ProcessEngine(devices).map(work, todo, on_message=unit_done)) as results:
            for index, _ in results:
                left_units[todo[index]] = 0
                progress("blocks", total - sum(left_units.values()), total)
    finally:
        for spilled in runner.folder.path.glob(f"{_SPILLED}*"):
            spilled.unlink(missing_ok=True)
    return {transformer.artefact_name(index) for transformer, index in left}


@dataclass(kw_only=True)
class _BlockWork:
    """Quantizes blocks of a run in another process, which loads the model once."""

    source: ModelSource
    dtype: torch.dtype | str | None
    job: BlockJob
    folder: Path
    linears: list[LinearPlan]
    _runner: BlockRunner | None = None

    def __call__(self, place: tuple[str, int], device: str, tell: Tell) -> None:
        if self._runner is None:
            self._runner = self._load(device)
        component, index = place
        transformers = {transformer.component: transformer for transformer in self._runner.teacher.transformers}
        self._runner.quantize(transformers[component], index, unit_done=lambda: tell(place))

    def _load(self, device: str) -> BlockRunner:
        job = replace(self.job, machine=replace(self.job.machine, device=device))
        teacher = load_teacher(self.source, job.recipe, dtype=self.dtype, device=device, linears=self.linears)
        return BlockRunner(ArtefactFolder(self.folder), teacher, job, spilled=f"{_SPILLED}{os.getpid()}-")
