"""Quantizing the blocks of a teacher into its run folder, one by one.

Blocks do not depend on each other, so a block is the same wherever it is quantized.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from s2q.blocks.quantize_block import block_fingerprint, quantize_block, to_artefact
from s2q.blocks.task import BlockTask, block_task
from s2q.calibration.artefacts import CalibrationCall, call_inputs
from s2q.calibration.calibration_set import CalibrationSets
from s2q.calibration.stream import TeacherStream
from s2q.calibration.teacher import Teacher, TeacherTransformer
from s2q.common.devices import peak_memory_bytes
from s2q.common.memory import Offload
from s2q.common.progress import Tick
from s2q.common.run_folder import ArtefactFolder
from s2q.common.tensor_store import HostMemory
from s2q.planning import CalibrationCost, Machine, activation_memory
from s2q.recipes.schema import Recipe


@dataclass(frozen=True, kw_only=True)
class BlockJob:
    """Data shared by all blocks of a run.

    Attributes:
        selected: None for recipes that do not calibrate, as is `cost`.
        offload: How the model runs on a device that is too small for it.
    """

    recipe: Recipe
    selected: CalibrationSets | None
    cost: CalibrationCost | None
    machine: Machine
    seed: int
    offload: Offload = "none"

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
            family=family,
            folder=self.folder.path,
            device=job.machine.device,
            memory=HostMemory(activation_memory(job.machine, job.cost.step_bytes)),
            page_out=self.teacher.page_out,
            component=transformer.component,
            tokens=transformer.tokens,
            pages=job.offload == "group",
            prefix=self.spilled,
        )

    def fingerprint(self, transformer: TeacherTransformer, index: int) -> str:
        """Hash all that the result of a block depends on."""
        return self._fingerprint(transformer, self._task(transformer, index, None))

    def quantize(self, transformer: TeacherTransformer, index: int, *, unit_done: Tick) -> str:
        """Quantize a block into the run folder; return the fingerprint of the result."""
        started = time.perf_counter()
        task = replace(self._task(transformer, index, self.stream_of(transformer)), progress=unit_done)
        fingerprint = self._fingerprint(transformer, task)
        result = quantize_block(task)
        seconds, peak = time.perf_counter() - started, peak_memory_bytes(self.job.machine.device)
        artefact = to_artefact(result, seconds=seconds, peak_memory_bytes=peak)
        self.folder.save(transformer.artefact_name(index), fingerprint, artefact)
        self.teacher.page_out(task.block)
        return fingerprint

    def close(self) -> None:
        """Remove activations from the disk; they are of no use later."""
        if self._stream is not None:
            self._stream[1].close()
            self._stream = None

    def stream_of(self, transformer: TeacherTransformer) -> TeacherStream | None:
        """Return the stream of the transformer at hand, None without samples; one is kept at a time."""
        if self.job.selected is None:
            return None
        if self._stream is None or self._stream[0] != transformer.component:
            self.close()
            self._stream = transformer.component, self.stream(transformer, self.job.selected)
        return self._stream[1]

    def _task(self, transformer: TeacherTransformer, index: int, stream: TeacherStream | None) -> BlockTask:
        job = self.job
        task = block_task(transformer, index, job.recipe, seed=job.seed, device=job.machine.device, stream=stream)
        if job.cost is None:
            return task
        return replace(task, checkpointed=job.cost.gradient_checkpointing, dtype=job.cost.torch_dtype)

    def _fingerprint(self, transformer: TeacherTransformer, task: BlockTask) -> str:
        selected = self.job.selected
        samples = None if selected is None else selected.fingerprint(transformer.component)
        return block_fingerprint(task, samples=samples)
