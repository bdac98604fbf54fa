"""The stages of a run, in order: load, collect, select, allocate, blocks, assemble, report."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from s2q import planning
from s2q.calibration.calibration_set import CalibrationSets, select
from s2q.calibration.candidates import (
    CalibrationInputs,
    branches_of,
    calibration_prompts,
    prepare,
    prepare_next,
    score_candidates,
)
from s2q.calibration.teacher import Teacher, load_teacher
from s2q.checkpoint import CheckpointRecords, save_checkpoint
from s2q.common import arguments
from s2q.common.components import full_name
from s2q.common.devices import peak_memory_bytes, reset_peak_memory
from s2q.common.errors import InvalidInputError, memory_errors
from s2q.common.fingerprint import fingerprint
from s2q.common.memory import Offload
from s2q.common.progress import Progress, part_of, silent
from s2q.common.records import REPORT_VERSION
from s2q.common.run_folder import RunFolder
from s2q.common.versions import package_versions
from s2q.engines.engine import Engine
from s2q.models import ModelSource
from s2q.planning import Machine, Plan, check_memory
from s2q.recipes.schema import Recipe
from s2q.run.allocate import Allocation, allocate
from s2q.run.assemble import assemble, check_bytes
from s2q.run.finished import run_inputs
from s2q.run.plan import plan_loaded, rounds_of
from s2q.run.report import BlockReport, QuantizationReport, log_block
from s2q.run.runner import BlockJob, BlockRunner
from s2q.run.settings import RunSettings
from s2q.run.work import SPILLED, TEACHER, BlockWork, Place, TeacherSource, record_prompts
from s2q.selection.scores import CandidatePool

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

_MAX_CHANGES = 8
_T = TypeVar("_T")


@dataclass
class _Finished:
    """Blocks that are quantized: reports and fingerprints of their results, by place."""

    reports: dict[Place, BlockReport] = field(default_factory=dict)
    fingerprints: dict[Place, str] = field(default_factory=dict)


class Run:
    """One run: its folder, its clock, and the stages in order."""

    def __init__(
        self,
        folder: RunFolder,
        out: Path,
        settings: RunSettings,
        progress: Progress | None,
        *,
        machine: Machine,
        source: ModelSource | None,
        engine: Engine,
    ) -> None:
        self.folder, self.out, self.settings = folder, out, settings
        self.source, self.machine, self.engine = source, machine, engine
        self.progress = progress or silent
        self.started = time.perf_counter()
        reset_peak_memory(settings.device)
        self.stages: dict[str, dict[str, Any]] = {}

    def carry_out(
        self, model: ModelSource | DiffusionPipeline, recipe: Recipe, prompts: Sequence[str] | None
    ) -> QuantizationReport:
        """Run all stages, write the checkpoint and return its report."""
        if not self.settings.resume:
            self.folder.clear()
        self.progress("load", 0, 1)
        teacher = self._timed("load", lambda: open_teacher(model, recipe, self.settings))
        self.progress("load", 1, 1)
        planned = plan_loaded(teacher, recipe, self.machine)
        check_memory(planned, workers=self.settings.workers.on_one_device(len(self.engine.devices)))
        self.engine.offer(TEACHER, teacher)
        named = model if isinstance(model, ModelSource) else teacher.name
        inputs = inputs_of(named, recipe, prompts, self.settings)
        request = fingerprint(inputs) if isinstance(model, ModelSource) else None
        if changes := self.folder.replace_inputs(inputs):
            logger.warning(
                "%s: inputs differ from those of the interrupted run: %s%s; what depends on them is computed again",
                self.out,
                "; ".join(changes[:_MAX_CHANGES]),
                f" (and {len(changes) - _MAX_CHANGES} more)" if len(changes) > _MAX_CHANGES else "",
            )
        self.folder.log("run", source=teacher.name, recipe=recipe.name, seed=self.settings.seed, request=request)
        selection, files, finished = None, dict[str, bytes](), _Finished()
        for component in rounds_of(teacher, recipe):
            selected = None
            if recipe.calibrates:
                selected = self._calibration(
                    teacher,
                    recipe,
                    prompts,
                    component=component,
                    before=None if selection is None else selection.inputs,
                    finished=finished,
                    offload=planned.offload or "none",
                )
                files |= selected.files
                selection = selected if selection is None else selection.with_samples(selected)
            if recipe.allocation is not None and selected is not None:
                allocated = self._allocation(teacher, recipe, planned, selected)
                planned = planning.plan_allocated(planned, teacher.linears, allocated.linears)
                teacher, files = teacher.with_linears(allocated.linears), files | allocated.files
            runner = self._runner(teacher, recipe, planned, selected)
            self._timed("blocks", functools.partial(self._blocks, runner, component, finished))
        blocks = list(finished.reports.values())
        n_prompts = len(prompts or ()) if selection is None else len(selection.inputs.prompts)
        student = self._timed("assemble", lambda: self._assemble(teacher.as_stored(), recipe, planned))
        report = self._report(teacher, recipe, planned, blocks, n_prompts=n_prompts, selection=selection)
        self.folder.log("assemble", seconds=report.seconds, peak_memory_bytes=report.peak_memory_bytes)
        records = CheckpointRecords(
            source=teacher.name,
            revision=report.source_revision,
            recipe=recipe.resolved(),
            report=report.to_dict(),
            events=self.folder.events(),
            base_folder=teacher.folder,
            files=files,
        )
        save_checkpoint(
            student,
            self.out,
            records=records,
            overwrite=self.settings.overwrite,
            max_shard_size=self.settings.max_shard_size,
            lock=self.folder.lock,
        )
        self.folder.clear()
        self.progress("assemble", 1, 1)
        storage = planned.storage
        logger.info("%s: %d bytes, %.2f times smaller", self.out, storage["quantized_bytes"], storage["ratio"])
        return report

    def _calibration(
        self,
        teacher: Teacher,
        recipe: Recipe,
        prompts: Sequence[str] | None,
        *,
        component: str | None,
        before: CalibrationInputs | None,
        finished: _Finished,
        offload: Offload,
    ) -> CalibrationSets:
        group = recipe.calibration
        used = calibration_prompts(teacher.name, prompts, group, recipe=recipe.name)
        if prompts is not None and len(prompts) > len(used):
            logger.info("calibrating on the first %d of %d prompts", len(used), len(prompts))
        quantized = tuple(dict.fromkeys(place[0] for place in finished.fingerprints))
        if before is None or component is None:
            described = {"device": torch.device(self.settings.device).type, "versions": package_versions()}
            inputs = prepare(teacher, used, group, seed=self.settings.seed, inputs=described, component=component)
        else:
            others = [part.described_without_blocks() for part in teacher.transformers if part.component in quantized]
            known = {"blocks": list(finished.fingerprints.values()), "others": others}
            inputs = prepare_next(before, teacher, group, component=component, quantized=known)
        pools = self._timed("collect", lambda: self._candidates(teacher, recipe, inputs, offload, quantized))
        self.folder.log(
            "collect", candidates=sum(map(len, pools.values())), prompts=len(inputs.prompts), offload=offload
        )
        self.progress("select", 0, 1)
        branches = branches_of(self.folder, inputs)
        selected = self._timed("select", lambda: select(pools, inputs, group, branches=branches))
        self.folder.log("select", selection=group.selection, samples=selected.count)
        self.progress("select", 1, 1)
        return selected

    def _candidates(
        self,
        teacher: Teacher,
        recipe: Recipe,
        inputs: CalibrationInputs,
        offload: Offload,
        quantized: tuple[str, ...],
    ) -> dict[str, CandidatePool]:
        """The scored steps of all prompts; prompts that are not in the folder are recorded first."""
        source = self._source(teacher, recipe)
        record_prompts(
            self.engine, source, inputs, self.folder, offload=offload, quantized=quantized, progress=self.progress
        )
        pools = score_candidates(teacher, inputs, self.folder)
        for part in teacher.parts:
            teacher.page_out(part)
        return pools

    def _allocation(self, teacher: Teacher, recipe: Recipe, planned: Plan, selected: CalibrationSets) -> Allocation:
        runner, source = self._runner(teacher, recipe, planned, selected), self._source(teacher, recipe)
        allocated = self._timed("allocate", lambda: allocate(runner, self.engine, source, progress=self.progress))
        record = allocated.record
        self.folder.log("allocate", **{key: record[key] for key in ("what", "most_bytes", "bytes", "linears")})
        return allocated

    def _source(self, teacher: Teacher, recipe: Recipe) -> TeacherSource:
        return TeacherSource(source=self.source, recipe=recipe, dtype=self.settings.dtype, linears=teacher.linears)

    def _runner(self, teacher: Teacher, recipe: Recipe, planned: Plan, selected: CalibrationSets | None) -> BlockRunner:
        sharing = self.settings.workers.on_one_machine(len(self.engine.devices))
        machine = replace(self.machine, memory_budget=self.machine.memory_budget // sharing)
        job = BlockJob(
            recipe=recipe,
            selected=selected,
            cost=planned.calibration,
            machine=machine,
            seed=self.settings.seed,
            offload=planned.offload or "none",
        )
        return BlockRunner(self.folder, teacher, job)

    def _blocks(self, runner: BlockRunner, component: str | None, finished: _Finished) -> None:
        """Quantize the blocks, of a transformer or of all, whose results are not in the run folder."""
        teacher, units = runner.teacher, runner.job.units
        expected, reports, total = finished.fingerprints, finished.reports, units * runner.teacher.block_count
        left: dict[Place, int] = {}

        def report(place: Place, *, resumed: bool) -> None:
            reports[place] = self._report_block(runner, place, index=list(expected).index(place), resumed=resumed)

        def show_progress() -> None:
            self.progress("blocks", len(expected) * units - sum(left.values()), total)

        def show_block(place: Place) -> None:
            if units > 1:
                name = part_of("blocks", _name_of_block(teacher, place))
                self.progress(name, units - left[place], units)

        def unit_done(place: Place) -> None:
            left[place] = max(0, left[place] - 1)
            show_progress()
            show_block(place)

        for transformer in teacher.transformers:
            for index, name in enumerate(transformer.block_names if component in (None, transformer.component) else ()):
                place = transformer.component, index
                expected[place] = runner.fingerprint(transformer, index)
                teacher.page_out(transformer.module.get_submodule(name))
                if self.folder.has(transformer.artefact_name(index), expected[place]):
                    report(place, resumed=True)
                else:
                    left[place] = units
        show_progress()
        work = BlockWork(teacher=self._source(teacher, runner.job.recipe), job=runner.job, folder=self.folder.path)
        places = list(left)
        try:
            with closing(self.engine.map(work, places, on_message=unit_done)) as results:
                for index, fingerprint in results:
                    place = places[index]
                    if fingerprint != expected[place]:
                        raise InvalidInputError(
                            f"{teacher.name}: a worker computed block {place[1]} of {place[0]} from other weights or "
                            "versions than this process has; make the model the same on all machines"
                        )
                    left[place] = 0
                    show_progress()
                    show_block(place)
                    report(place, resumed=False)
        finally:
            for spilled in self.folder.path.glob(f"{SPILLED}*"):
                spilled.unlink(missing_ok=True)
        finished.reports = {place: reports[place] for place in expected}

    def _report_block(self, runner: BlockRunner, place: Place, *, index: int, resumed: bool) -> BlockReport:
        name, key = _name_of_block(runner.teacher, place), runner.teacher.transformer(place[0]).artefact_name(place[1])
        report = BlockReport(index=index, name=name, resumed=resumed, **self.folder.stats(key))
        self.folder.log("block", **{name: value for name, value in asdict(report).items() if name != "attention"})
        log_block(report, total=runner.teacher.block_count)
        return report

    def _assemble(self, teacher: Teacher, recipe: Recipe, planned: Plan) -> DiffusionPipeline:
        self.progress("assemble", 0, 1)
        student = assemble(teacher, self.folder, recipe=recipe)
        check_bytes(student, planned)
        return student

    def _report(
        self,
        teacher: Teacher,
        recipe: Recipe,
        planned: Plan,
        blocks: Sequence[BlockReport],
        *,
        n_prompts: int,
        selection: CalibrationSets | None,
    ) -> QuantizationReport:
        return QuantizationReport(
            schema_version=REPORT_VERSION,
            source=teacher.name,
            source_revision=None if teacher.source is None else teacher.source.revision,
            source_variant=None if teacher.source is None else teacher.source.variant,
            recipe=planned.recipe,
            output=self.out.name,
            seed=self.settings.seed,
            device=self.settings.device,
            dtype=arguments.dtype_name(teacher.dtype),
            n_prompts=n_prompts,
            selection=None if selection is None else selection.summary(),
            storage=planned.storage,
            layers=[asdict(layer) for layer in planned.layers],
            simulated=planned.simulated,
            allocation=None if planned.allocation is None else asdict(planned.allocation),
            blocks=tuple(blocks),
            stages=tuple(self.stages.values()),
            seconds=time.perf_counter() - self.started,
            peak_memory_bytes=peak_memory_bytes(self.settings.device),
            retries=tuple(asdict(retry) for retry in self.engine.retries),
            loras=() if teacher.source is None else tuple(lora.to_dict() for lora in teacher.source.loras),
            versions=package_versions(),
            generation=recipe.calibration.generation if recipe.calibrates else {},
            text_encoders=tuple(asdict(encoder) for encoder in planned.text_encoders),
            offload=planned.offload,
            calibration_dtype=None if planned.calibration is None else planned.calibration.dtype,
        )

    def _timed(self, stage: str, work: Callable[[], _T]) -> _T:
        started = time.perf_counter()
        remedy = "free some, and run again: finished blocks are kept"
        with memory_errors(f"quantizing on {self.settings.device}, stage {stage}", remedy=remedy):
            result = work()
        seconds, peak = time.perf_counter() - started, peak_memory_bytes(self.settings.device)
        before = self.stages.get(stage, {"seconds": 0.0})
        self.stages[stage] = {"name": stage, "seconds": before["seconds"] + seconds, "peak_memory_bytes": peak}
        return result


def _name_of_block(teacher: Teacher, place: Place) -> str:
    component, index = place
    return full_name(component, teacher.transformer(component).block_names[index])


def inputs_of(
    model: ModelSource | str, recipe: Recipe, prompts: Sequence[str] | None, settings: RunSettings
) -> dict[str, Any]:
    """Return everything that the checkpoint depends on; see `run_inputs`."""
    options = {name: str(getattr(settings, name)) for name in ("seed", "dtype", "variant", "max_shard_size")}
    return run_inputs(model, recipe, prompts, {**options, "device": torch.device(settings.device).type})


def open_teacher(model: ModelSource | DiffusionPipeline, recipe: Recipe, settings: RunSettings) -> Teacher:
    """Load the full-precision model as the settings say."""
    return load_teacher(model, recipe, dtype=settings.dtype, device=settings.device)
