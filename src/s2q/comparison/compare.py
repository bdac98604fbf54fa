"""A comparison from start to end: check, quantize, evaluate, merge. Every stage can be resumed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from s2q.common import arguments
from s2q.common.arguments import optional
from s2q.common.errors import BusyError, DiskFullError, InvalidInputError, memory_errors
from s2q.common.files import atomic_write_json
from s2q.common.outputs import output_lock
from s2q.common.progress import Progress, silent
from s2q.common.records import COMPARISON_VERSION
from s2q.common.run_folder import remove_run_folder
from s2q.common.torch_state import in_fresh_torch_state
from s2q.comparison.entries import Entry
from s2q.comparison.folder import RESULT, CompareFolder
from s2q.comparison.pages import command_of, write_pages
from s2q.comparison.peers import cost_of_peer
from s2q.comparison.results import build_result, entry_plan
from s2q.comparison.setup import CompareSettings, RunPlan, Setup, set_up
from s2q.comparison.shards import evaluate_shards, failure_of, pending_shards, steps_of
from s2q.engines.options import AUTO, workers_argument
from s2q.generation.generate import LESS_MEMORY
from s2q.generation.load import check_model, models_that_fit
from s2q.generation.prompts import prompt_list
from s2q.generation.settings import requested_settings
from s2q.recipes.load import checked_overrides, load_recipe
from s2q.recipes.schema import Recipe
from s2q.run.quantize import quantize

logger = logging.getLogger(__name__)

_ROUNDING_UNITS = 1
_TRAINING_UNITS = 2  # collecting and rounding, beside the epochs


@memory_errors("comparing", remedy=LESS_MEMORY)
@in_fresh_torch_state
def compare(
    entries: Sequence[str] = (),
    *,
    model: str | Path,
    out: str | Path,
    peers: Sequence[str] = (),
    prompts: Sequence[str] | None = None,
    num_prompts: int = 32,
    seeds: Sequence[int] = (0, 1),
    calibration_prompts: Sequence[str] | None = None,
    samples: int | None = None,
    overrides: Sequence[str] = (),
    seed: int = 0,
    metrics: Sequence[str] = (),
    lpips_weights: str | Path | None = None,
    clip: str | Path | None = None,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_scale_2: float | None = None,
    scheduler: str | None = None,
    shift: float | None = None,
    negative_prompt: str | None = None,
    max_sequence_length: int | None = None,
    device: str | torch.device | int = "cpu",
    dtype: torch.dtype | str | None = None,
    variant: str | None = None,
    loras: Sequence[str | Path] = (),
    verify: bool | None = None,
    workers: int | str = AUTO,
    devices: Sequence[str] | None = None,
    engine: str = "processes",
    ray_address: str | None = None,
    offload: str = AUTO,
    resume: bool = True,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare recipes and checkpoints with full precision and each other; options as of `quantize` and `evaluate`.

    Args:
        entries: Recipes by name (`all` and patterns such as "s2q-*" too) or file, and checkpoint folders.
        model: The full-precision reference: embedded name, folder or Hub id.
        peers: Other tools, by their names in `comparison.peers.PEERS`; ["all"] for the installed ones.
        out: Folder to write; a comparison there is resumed, and may get more entries.
        prompts: Prompts to generate; None takes `num_prompts` held-out captions of an embedded model.
        loras: LoRA adapters to fuse into the reference and what recipes quantize.
        overrides: Changes to the recipes; those to `calibration` and `distillation` are made where they apply.
        resume: Whether to resume the comparison in `out`; False replaces it and needs `overwrite`, which allows that.

    Returns:
        The content of `compare.json`, with the `error` of what failed; of a dry run, the plan. Raises as `quantize`.
    """
    requested = (
        requested_settings(num_frames=num_frames, height=height, width=width, num_inference_steps=num_inference_steps)
        | requested_settings(guidance_scale=guidance_scale, guidance_scale_2=guidance_scale_2)
        | requested_settings(scheduler=scheduler, shift=shift)
        | requested_settings(negative_prompt=negative_prompt, max_sequence_length=max_sequence_length)
    )
    where = workers_argument(workers=workers, devices=devices, device=device, engine=engine, ray_address=ray_address)
    settings = CompareSettings(
        entries=arguments.name_list("entries", entries),
        peers=arguments.name_list("peers", peers),
        model=_name_of(model),
        out=arguments.path_argument("out", out),
        prompts=optional(prompt_list, "prompts", prompts),
        num_prompts=arguments.whole_number("num_prompts", num_prompts, least=1),
        seeds=arguments.seed_numbers(seeds),
        calibration_prompts=optional(prompt_list, "calibration_prompts", calibration_prompts),
        seed=arguments.seed_number(seed),
        samples=optional(arguments.whole_number, "samples", samples, least=1),
        overrides=checked_overrides(overrides),
        metrics=arguments.name_list("metrics", metrics),
        lpips_weights=optional(arguments.path_argument, "lpips_weights", lpips_weights),
        clip=optional(arguments.path_argument, "clip", clip),
        requested=requested,
        dtype=_dtype_name(dtype),
        variant=optional(arguments.word, "variant", variant),
        loras=arguments.path_list("loras", loras),
        verify=optional(arguments.flag, "verify", verify),
        workers=where,
        offload=arguments.offload_name(offload, device=where.device),
        resume=arguments.flag("resume", resume),
        overwrite=arguments.flag("overwrite", overwrite),
        dry_run=arguments.flag("dry_run", dry_run),
    )
    return _compare(settings, progress or silent)


def _name_of(model: object) -> str:
    """The name or folder of a model; a loaded pipeline is refused."""
    model = arguments.model_argument("model", model)
    if not isinstance(model, str | Path):
        raise InvalidInputError("compare: got a loaded pipeline; pass its name or folder, which every process loads")
    return str(model)


def _dtype_name(dtype: torch.dtype | str | None) -> str | None:
    parsed = arguments.parse_dtype(dtype)
    return None if parsed is None else arguments.dtype_name(parsed)


def _compare(settings: CompareSettings, progress: Progress) -> dict[str, Any]:
    setup, folder = set_up(settings), CompareFolder(settings.out)
    folder.check(setup.plan, resume=settings.resume, overwrite=settings.overwrite)
    if settings.dry_run:
        return _dry(setup)
    if len(setup.obstacles) == len(setup.entries):
        raise InvalidInputError(f"nothing can be compared: {next(iter(setup.obstacles.values()))}")
    with output_lock(settings.out):
        # again: another run may have been here
        folder.check(setup.plan, resume=settings.resume, overwrite=settings.overwrite)
        plan = folder.open(setup.plan, resume=settings.resume)
        failures = dict(setup.obstacles)
        failures |= _quantize(folder, setup, settings, progress)
        failures |= _ask_peers(folder, setup, settings)
        failures |= _evaluate(folder, plan, setup, settings, failures=failures, progress=progress)
        result = build_result(folder, plan, setup, failures, progress=progress)
        atomic_write_json(settings.out / RESULT, result)
        write_pages(folder, result, command=command_of(setup, settings), progress=progress)
    return result


def _dry(setup: Setup) -> dict[str, Any]:
    plan = setup.plan
    return {
        "schema_version": COMPARISON_VERSION,
        "model": plan.model,
        "n_prompts": len(plan.prompts),
        "n_seeds": len(plan.seeds),
        "n_videos": len(plan.prompts) * len(plan.seeds) * (1 + len(setup.entries) - len(setup.obstacles)),
        "settings": dict(plan.settings),
        "metrics": list(plan.metrics),
        "entries": [entry_plan(setup, entry) for entry in setup.entries],
    }


def _quantize(folder: CompareFolder, setup: Setup, settings: CompareSettings, report: Progress) -> dict[str, str]:
    """Quantize with every recipe that has no checkpoint here; return why recipes failed."""
    todo = []
    for entry in setup.entries:
        if entry.label in setup.planned and _is_made(folder, entry):
            remove_run_folder(folder.checkpoint(entry.label))
        elif entry.label in setup.planned:
            todo.append(entry)
    workers = settings.workers
    failures: dict[str, str] = {}
    units = [_units(entry.recipe) for entry in todo if entry.recipe is not None]
    done, total = 0, sum(units)
    for entry, share in zip(todo, units, strict=True):
        assert entry.recipe is not None

        def stage(name: str, part: int, whole: int, before: int = done, share: int = share) -> None:
            if name == "blocks":
                report("quantize", before + share * part // max(1, whole), total)

        try:
            quantize(
                setup.source,
                recipe=entry.recipe,
                out=folder.checkpoint(entry.label),
                prompts=setup.plan.calibration_prompts if entry.recipe.calibrates else None,
                progress=stage,
                seed=settings.seed,
                workers=AUTO if workers.count is None else workers.count,
                devices=None if workers.engine == "ray" else workers.devices,
                device=workers.device,
                engine=workers.engine,
                ray_address=workers.ray_address,
                dtype=settings.dtype,
                offload=settings.offload,
                resume=settings.resume,
                overwrite=folder.checkpoint(entry.label).exists(),
            )
        except (BusyError, DiskFullError):
            raise
        except Exception as error:  # whatever it is, the others go on
            failures[entry.label] = failure_of(entry.label, error, "quantized", device=settings.device)
        done += share
        report("quantize", done, total)
    return failures


def _ask_peers(folder: CompareFolder, setup: Setup, settings: CompareSettings) -> dict[str, str]:
    """Let every peer quantize the model for its seconds and bytes, if that is not known; return why peers failed."""
    failures: dict[str, str] = {}
    for entry in setup.entries:
        if entry.peer is None or folder.load_cost(entry.label, entry.identity()) is not None:
            continue
        try:
            prompts = setup.plan.calibration_prompts
            cost = cost_of_peer(entry.peer, setup.source, device=settings.device, prompts=prompts)
            folder.save_cost(entry.label, entry.identity(), cost)
        except DiskFullError:
            raise
        except Exception as error:  # whatever it is, the others go on
            failures[entry.label] = failure_of(entry.label, error, "quantized", device=settings.device)
    return failures


def _is_made(folder: CompareFolder, entry: Entry) -> bool:
    """Whether the checkpoint of a recipe is there, whole, and of this very recipe."""
    assert entry.recipe is not None
    path = folder.checkpoint(entry.label)
    try:
        check_model(path, verify=True)
        made_of = load_recipe(path / "s2q" / "recipe.json")
    except (InvalidInputError, OSError, ValueError):
        return False
    return made_of.model_copy(update={"description": entry.recipe.description}) == entry.recipe


def _units(recipe: Recipe) -> int:
    """Approximate cost of a recipe for the progress bar, in hundredths of a pass over the blocks."""
    return 100 * (_TRAINING_UNITS + recipe.epochs if recipe.calibrates else _ROUNDING_UNITS)


def _evaluate(
    folder: CompareFolder,
    plan: RunPlan,
    setup: Setup,
    settings: CompareSettings,
    *,
    failures: dict[str, str],
    progress: Progress,
) -> dict[str, str]:
    """Evaluate what is not evaluated yet; return why entries failed."""
    shards = pending_shards(folder, plan, [entry.label for entry in setup.entries if entry.label not in failures])
    if not shards:
        return {}
    workers = settings.workers
    room = models_that_fit((setup.source,), workers.device) if workers.is_cpu else None
    most = None if room is None else max(1, room)
    total = sum(steps_of(plan, shard, setup.batch_size) for shard in shards)
    done = 0

    def stepped() -> None:
        nonlocal done
        done += 1
        if done == 1:  # the remaining time is estimated from here on
            progress("load", 1, 1)
            progress("evaluate", 0, total)
        else:
            progress("evaluate", min(done, total - 1), total)

    progress("load", 0, 1)
    failed = evaluate_shards(folder, plan, shards, where=workers, most=most, stepped=stepped)
    progress("evaluate", total, total)
    return failed
