"""A run from start to end: load, collect, select, allocate, blocks, assemble, report.

Blocks do not depend on each other: each is computed from the full-precision model and the recipe alone, written
atomically into the run folder, and skipped when it is there with the fingerprint of the same inputs. A killed run
is therefore resumed with a bit-identical result. The output appears at its place all at once.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from s2q import planning
from s2q.calibration.candidates import (
    calibration_prompts,
)
from s2q.checkpoint import owned_files
from s2q.common import arguments
from s2q.common.errors import UsageError, memory_errors
from s2q.common.fingerprint import fingerprint
from s2q.common.outputs import check_output
from s2q.common.progress import Progress
from s2q.common.run_folder import open_run_folder
from s2q.common.torch_state import in_fresh_torch_state
from s2q.core.storage import parse_bytes
from s2q.engines.engine import fixed_threads
from s2q.engines.options import AUTO, Workers, workers_argument
from s2q.generation.prompts import prompt_list
from s2q.models import ModelSource
from s2q.planning import Plan, check_memory, workers_that_fit
from s2q.recipes.schema import Recipe
from s2q.run.finished import finished_report
from s2q.run.plan import plan_loaded
from s2q.run.report import QuantizationReport
from s2q.run.settings import RunSettings, recipe_argument, source_of
from s2q.run.stages import Run, inputs_of, open_teacher

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

_BLOCK = re.compile(r"(.+?\.\d+)\.")
_WORKER_MODULES = ("s2q.run.work",)


@memory_errors("planning", remedy="free some")
@in_fresh_torch_state
def quantize(
    model: str | Path | ModelSource | DiffusionPipeline,
    *,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    out: str | Path | None = None,
    prompts: Sequence[str] | None = None,
    samples: int | None = None,
    overrides: Sequence[str] = (),
    seed: int = 0,
    device: str | torch.device | int = "cpu",
    dtype: torch.dtype | str | None = None,
    variant: str | None = None,
    loras: Sequence[str | Path] = (),
    max_shard_size: int | str = "10GB",
    memory_budget: int | str | None = None,
    workers: int | str = AUTO,
    devices: Sequence[str] | None = None,
    engine: str = "processes",
    ray_address: str | None = None,
    offload: str = AUTO,
    resume: bool = True,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> QuantizationReport | Plan:
    """Quantize a text-to-video pipeline into a checkpoint that diffusers' `from_pretrained` loads after `import s2q`.

    Args:
        model: Embedded name, pipeline folder, Hub id ("organisation/name@revision"), a resolved source, or a loaded
            pipeline, which is not changed.
        recipe: Name, file, contents, or a validated recipe.
        out: Folder to write; needed unless `dry_run`.
        prompts: Calibration prompts; the first `calibration.n_prompts` are used, by recipes that calibrate. None takes
            those of an embedded model.
        samples: Calibration samples; None leaves it to the recipe.
        overrides: Changes to the recipe, "key=value" each.
        loras: LoRA adapters to fuse into the model before it is quantized, "[transformer_2=]FILE.safetensors[:SCALE]".
        dtype: Compute dtype; None is the stored one, or float32 where the device emulates that.
        memory_budget: Host memory for the activations of calibration, "16GB"; the rest is on disk, in the run folder.
            None takes half of the host's memory, at most 16 GB.
        workers: Number of workers, which record prompts and quantize blocks side by side and load the model each, or
            "auto": every visible GPU, or a process for each core of a CPU, as far as memory allows. Each computes in
            one thread on a CPU. A loaded pipeline is quantized in this process.
        devices: Devices that workers take in turn, such as ["cuda:0", "cuda:2"]; replaces `device`.
        engine: "processes" of this machine, or "ray".
        ray_address: Address of a Ray cluster, "HOST:PORT" or "auto"; None takes `RAY_ADDRESS`, or starts Ray here.
        offload: How the model generates calibration videos on a GPU that is too small for it: "none", "model" (text
            encoders, transformers and autoencoder come in turn), "group" (their blocks in turn), or "auto", the first
            that fits by the plan. Results do not depend on it.
        resume: Whether to use what an interrupted run has finished.
        dry_run: Whether to return the plan and compute nothing.

    Returns:
        The report, or the plan of a dry run.

    Raises:
        InvalidInputError: If the model, the recipe or the output will not do; nothing has been written then.
        BusyError: If another run writes the same output.
        ResourceError: If the device is not there or the disk is full.
        UsageError: If `out` is missing, or an option does not apply to the model or the recipe.
    """
    where = workers_argument(workers=workers, devices=devices, device=device, engine=engine, ray_address=ray_address)
    settings = RunSettings(
        seed=arguments.seed_number(seed),
        dtype=arguments.parse_dtype(dtype),
        variant=arguments.optional(arguments.word, "variant", variant),
        loras=arguments.path_list("loras", loras),
        max_shard_size=parse_bytes(max_shard_size, option="max_shard_size"),
        memory_budget=None if memory_budget is None else parse_bytes(memory_budget, option="memory_budget"),
        workers=where,
        offload=arguments.offload_name(offload, device=where.device),
        resume=arguments.flag("resume", resume),
        overwrite=arguments.flag("overwrite", overwrite),
    )
    model, target = arguments.model_argument("model", model), arguments.optional(arguments.path_argument, "out", out)
    dry_run = arguments.flag("dry_run", dry_run)
    prompts = arguments.optional(prompt_list, "prompts", prompts, allow_none=True)
    validated = recipe_argument(recipe, overrides, samples=samples)
    return _quantize(model, validated, prompts, target, settings, dry_run=dry_run, progress=progress)


def _quantize(
    model: str | Path | ModelSource | DiffusionPipeline,
    validated: Recipe,
    prompts: Sequence[str] | None,
    target: Path | None,
    settings: RunSettings,
    *,
    dry_run: bool,
    progress: Progress | None,
) -> QuantizationReport | Plan:
    """Check everything that can be checked before weights are read, then plan or run."""
    source = source_of(model, settings)
    machine = planning.this_machine(
        settings.device,
        memory_budget=settings.memory_budget,
        offload=settings.offload,
        sharing=settings.workers.on_one_gpu,
    )
    planned = None if source is None else planning.plan_model(source, validated, dtype=settings.dtype, machine=machine)
    if target is not None:
        if source is not None and settings.resume and not (dry_run or settings.overwrite):
            if finished := finished_report(target, fingerprint(inputs_of(source, validated, prompts, settings))):
                return finished
        check_output(target, overwrite=settings.overwrite, owned=owned_files)
    if not validated.calibrates and prompts is not None:
        logger.warning("prompts (--prompts): recipe %s needs no calibration, they are ignored", validated.name)
    if validated.calibrates and source is not None:
        calibration_prompts(source.name, prompts, validated.calibration, recipe=validated.name)
    if dry_run:
        return planned or plan_loaded(open_teacher(model, validated, settings), validated, machine)
    workers = 1 if planned is None else _worker_count(planned, validated, settings.workers)
    if planned is not None:
        check_memory(planned, workers=settings.workers.on_one_device(workers))
    if target is None:
        raise UsageError("quantize: no output given; pass out=FOLDER (-o FOLDER), or use a dry run")
    with open_run_folder(target) as folder, memory_errors(f"quantizing on {settings.device}", remedy="free some"):
        check_output(target, overwrite=settings.overwrite, owned=owned_files)  # a killed run may have put it back
        threads = nullcontext() if source is None else fixed_threads(settings.device)
        with threads, closing(settings.workers.open(workers, modules=_WORKER_MODULES, shared=folder.path)) as engine:
            run = Run(folder, target, settings, progress, machine=machine, source=source, engine=engine)
            return run.carry_out(source or model, validated, prompts)


def _worker_count(planned: Plan, recipe: Recipe, workers: Workers) -> int:
    """Number of workers of a run: by default one for each GPU, or as many as fit the host; one without calibration."""
    blocks = len({match[1] for layer in planned.layers if (match := _BLOCK.match(layer.name))})
    room = workers_that_fit(planned) if workers.is_cpu else None  # GPUs have a worker each
    return workers.planned(blocks, most=room if recipe.calibrates else 1)
