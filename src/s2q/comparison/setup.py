"""A comparison before any compute: its options, everything that can be checked, and what it will do."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from s2q.common.arguments import (
    device_name,
    dtype_name,
    flag,
    model_argument,
    name_list,
    optional_path,
    optional_text,
    parse_dtype,
    prompt_list,
    seed_number,
    whole_number,
)
from s2q.common.devices import emulated_dtypes
from s2q.common.errors import InvalidInputError, S2QError, UsageError
from s2q.common.files import sha256_file
from s2q.common.records import COMPARISON_VERSION
from s2q.comparison.entries import (
    Entry,
    content_of,
    content_of_files,
    find_entries,
)
from s2q.evaluation.evaluate import default_prompts
from s2q.evaluation.judges.learned import open_judges
from s2q.evaluation.summary import version_of, versions
from s2q.evaluation.video_metrics import selected_metrics
from s2q.generation.defaults import generation_defaults
from s2q.generation.generate import batch_size_for, settings_for
from s2q.generation.load import check_model, load_pipeline
from s2q.generation.prompts import check_distinct
from s2q.generation.settings import check_prompts, requested_settings
from s2q.models import ModelSource, family_of, resolve_model
from s2q.models.architecture import architecture_of, check_comparable, warn_of_scheduler
from s2q.models.source import check_full_precision
from s2q.planning import Plan, check_memory
from s2q.recipes.load import checked_overrides
from s2q.run.quantize import quantize
from s2q.shapes.embedded import EMBEDDED_NAMES

logger = logging.getLogger(__name__)

SHARD_PROMPTS = 8
"""Prompts that are evaluated together; results do not depend on how many processes share the shards."""

_NOT_COMMON = ("entries", "paths", "variant", "verify")
_PACKAGES = ("s2q", "torch", "diffusers", "transformers")


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Settings of a comparison.

    Attributes:
        num_prompts: Held-out captions, for embedded models without prompts.
        seeds: Videos for each prompt, seeds 0 to this minus 1.
        calibration_prompts: Prompts on which all recipes that calibrate do; None takes those of an embedded model.
        seed: Seed of every quantization.
        samples: Calibration samples, for the recipes that calibrate; None leaves it to each recipe.
        overrides: Changes to the recipes, "key=value" each; those to `calibration` and `distillation` are made to the
            recipes that have them.
        metrics: Names out of `s2q.evaluation.METRICS`, and of learned judges that have weights; empty means all.
        lpips_weights: File of LPIPS's weights; None for no `lpips`.
        clip: Folder of a CLIP model; None for no `clip_score`, `clipsim` and `clip_temp`.
        settings: Generation settings that differ from the model's own, by field name of `GenerationSettings`.
        device: Device; with several processes and "cuda", the GPUs take turns.
        dtype: Compute dtype; None is the one that the reference is stored in, float32 where the device emulates that.
        variant: Variant of the weights, "fp16"; the reference must have it, and a checkpoint that has it is loaded in
            it too.
        verify: What is verified of s2q checkpoints; see `s2q.generation.load.load_pipeline`.
        processes: Processes that share the prompts.
        resume: Whether to keep what an interrupted run has finished.
        overwrite: Whether an earlier, different comparison in the folder may be replaced.
        dry_run: Whether to check everything and compute nothing.
    """

    num_prompts: int = 32
    seeds: int = 2
    calibration_prompts: Sequence[str] | None = None
    seed: int = 0
    samples: int | None = None
    overrides: Sequence[str] = ()
    metrics: Sequence[str] = ()
    lpips_weights: Path | None = None
    clip: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    device: str | torch.device | int = "cpu"
    dtype: torch.dtype | str | None = None
    variant: str | None = None
    verify: bool | None = None
    processes: int = 1
    resume: bool = True
    overwrite: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        dtype, calibration = parse_dtype(self.dtype), self.calibration_prompts
        counts = ("num_prompts", "seeds", "processes")
        normalised = {
            **{name: whole_number(name, getattr(self, name), least=1) for name in counts},
            **{name: flag(name, getattr(self, name)) for name in ("resume", "overwrite", "dry_run")},
            **{name: optional_path(name, getattr(self, name)) for name in ("lpips_weights", "clip")},
            "calibration_prompts": None
            if calibration is None
            else tuple(prompt_list(calibration, name="calibration_prompts")),
            "seed": seed_number(self.seed),
            "samples": None if self.samples is None else whole_number("samples", self.samples, least=1),
            "overrides": checked_overrides(self.overrides),
            "metrics": name_list("metrics", self.metrics),
            "settings": requested_settings(self.settings),
            "variant": optional_text("variant", self.variant),
            "verify": None if self.verify is None else flag("verify", self.verify),
            "device": device_name(self.device),
            "dtype": None if dtype is None else dtype_name(dtype),
        }
        for name, value in normalised.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Everything that the results of a comparison depend on, as plain data; stored in compare_run.json.

    Attributes:
        model: The reference as it was given.
        content: What tells it apart from others.
        prompts: The prompts.
        seeds: Every prompt is generated with each.
        settings: Generation settings by name, complete.
        metrics: Version of each metric to compute, by name.
        judges: Weights of learned judges by name, `lpips` and `clip`: their path, and what tells them apart.
        dtype: Compute dtype; None is the stored one, or float32 in place of an emulated one.
        device: "cpu" or "cuda".
        emulated: Dtypes that the device emulates.
        calibration_prompts: What was given; None means the model's own.
        seed: Seed of every quantization.
        versions: Versions of the packages that decide results.
        entries: What each entry's results depend on, by label.
        paths: What checkpoints are loaded by, by label; no result depends on it.
        variant: Variant of the weights; `content` and `entries` tell what is loaded.
        verify: What is verified of checkpoints that were given; no result depends on it.
    """

    model: str
    content: Any
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: Mapping[str, Any]
    metrics: Mapping[str, int]
    judges: Mapping[str, Mapping[str, Any]]
    dtype: str | None
    device: str
    emulated: tuple[str, ...]
    calibration_prompts: tuple[str, ...] | None
    seed: int
    versions: Mapping[str, str]
    entries: Mapping[str, Any]
    paths: Mapping[str, str]
    variant: str | None = None
    verify: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, with its `schema_version`."""
        return {"schema_version": COMPARISON_VERSION, **asdict(self)}

    def judge(self, name: str) -> Path | None:
        """Return where the weights of a learned judge are, `lpips` or `clip`; None without them."""
        return Path(self.judges[name]["path"]) if name in self.judges else None

    def common(self) -> dict[str, Any]:
        """Return what the results of all entries depend on."""
        return {name: value for name, value in self.to_dict().items() if name not in _NOT_COMMON}

    def shards(self) -> list[list[str]]:
        """Return the prompts, `SHARD_PROMPTS` at a time."""
        return [
            list(self.prompts[start : start + SHARD_PROMPTS]) for start in range(0, len(self.prompts), SHARD_PROMPTS)
        ]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A comparison that has passed all checks.

    Attributes:
        plan: What its results depend on.
        source: The full-precision reference.
        entries: What is compared.
        planned: Plan of each recipe's quantization, by label.
        obstacles: Why a recipe cannot take the model, by label.
        batch_size: Videos computed at once.
    """

    plan: RunPlan
    source: ModelSource
    entries: tuple[Entry, ...]
    planned: Mapping[str, Plan]
    obstacles: Mapping[str, str]
    batch_size: int


def set_up(given: Sequence[str], model: str, *, prompts: Sequence[str] | None, options: CompareOptions) -> Setup:
    """Find and check everything that a comparison needs, before any compute.

    Args:
        given: See `find_entries`.
        model: The full-precision reference.
        prompts: Prompts to generate; None takes held-out captions of an embedded model.
        options: How to compare.

    Returns:
        What will be done.

    Raises:
        InvalidInputError: Something is unknown, does not fit, or is too long; nothing has been written.
        ResourceError: There is no such device.
        UsageError: There is nothing to compare, or nothing to calibrate on the calibration prompts.
    """
    given, model = name_list("compare", given), model_argument("model", model)
    if not isinstance(model, str | Path):
        raise InvalidInputError("compare: got a loaded pipeline; pass its name or folder, which every process loads")
    model = str(model)
    if not given:
        raise UsageError("compare: got nothing to compare; name recipes (all, s2q-*) or checkpoint folders")
    weights = {"lpips": options.lpips_weights, "clip": options.clip}
    learned = open_judges(lpips_weights=weights["lpips"], clip=weights["clip"], device="cpu").names
    metrics = selected_metrics(tuple(options.metrics), learned=learned)
    samples = () if options.samples is None else (f"calibration.samples={options.samples}",)
    entries = find_entries(
        given, overrides=(*options.overrides, *samples), variant=options.variant, verify=options.verify
    )
    source = resolve_model(model, variant=options.variant)
    check_full_precision(source)
    check_model(source)
    family_of(source.transformer_class)
    reference = architecture_of(source, label=source.name)
    for entry in entries:
        if entry.source is not None:
            ours = architecture_of(entry.source, label=entry.given)
            check_comparable(ours, reference)
            warn_of_scheduler(ours, reference)
    texts = prompt_list(prompts) if prompts is not None else default_prompts(model, count=options.num_prompts)
    seeds = tuple(range(options.seeds))
    check_distinct(texts)
    _check_calibration(entries, source, options)
    pipe = _pipeline_to_ask(source)
    settings = settings_for(pipe, options.settings, defaults=generation_defaults(source))
    check_prompts(pipe, texts)
    if options.calibration_prompts is not None:
        check_prompts(pipe, options.calibration_prompts)
    planned, obstacles = _plans(entries, source, options)
    calibration = options.calibration_prompts
    return Setup(
        plan=RunPlan(
            model=model if source.hub is None else source.pinned,
            content=content_of(source),
            prompts=tuple(texts),
            seeds=seeds,
            settings=settings.to_dict(),
            metrics={name: version_of(name) for name in metrics},
            judges={name: _weights_at(path) for name, path in weights.items() if path is not None},
            dtype=options.dtype,
            device=options.device.partition(":")[0],
            emulated=tuple(map(dtype_name, emulated_dtypes(options.device))),
            calibration_prompts=None if calibration is None else tuple(calibration),
            seed=options.seed,
            versions={name: version for name, version in versions().items() if name in _PACKAGES},
            entries={entry.label: entry.identity() for entry in entries},
            paths={entry.label: entry.path for entry in entries if entry.path is not None},
            variant=options.variant,
            verify=options.verify,
        ),
        source=source,
        entries=tuple(entries),
        planned=planned,
        obstacles=obstacles,
        batch_size=batch_size_for(pipe, settings, None),
    )


def _weights_at(path: Path) -> dict[str, Any]:
    """Path of weights, with the hashes that identify them."""
    path = path.expanduser().resolve()
    weights = sha256_file(path) if path.is_file() else content_of_files(path, path.iterdir())
    return {"path": str(path), "weights": weights}


def _check_calibration(entries: Sequence[Entry], source: ModelSource, options: CompareOptions) -> None:
    calibrating = [entry.label for entry in entries if entry.recipe is not None and entry.recipe.calibrates]
    if options.calibration_prompts is None:
        if calibrating and source.name not in EMBEDDED_NAMES:
            raise InvalidInputError(
                f"{', '.join(calibrating)} need calibration prompts; pass --calibration-prompts FILE "
                "(calibration_prompts=[...] in Python)"
            )
    elif not calibrating:
        raise UsageError("compare: calibration prompts were given, but no recipe calibrates; remove them")
    else:
        check_distinct(options.calibration_prompts)


def _pipeline_to_ask(source: ModelSource) -> Any:
    """The pipeline without weights, or with them where it cannot be built without: it knows its sizes and its text."""
    transformers = source.meta_transformers()
    try:
        return source.meta_pipeline(transformers)
    except (AttributeError, ImportError, OSError, TypeError, ValueError) as error:
        logger.info("%s: the pipeline cannot be built without weights (%s) and is loaded", source.name, error)
        return load_pipeline(source)


def _plans(
    entries: Sequence[Entry], source: ModelSource, options: CompareOptions
) -> tuple[dict[str, Plan], dict[str, str]]:
    """Plan every recipe; one that cannot take the model does not keep the others from it."""
    planned: dict[str, Plan] = {}
    obstacles: dict[str, str] = {}
    for entry in entries:
        if entry.recipe is None:
            continue
        try:
            result = quantize(
                source,
                recipe=entry.recipe,
                prompts=options.calibration_prompts,
                dry_run=True,
                device=options.device,
                dtype=options.dtype,
            )
            assert isinstance(result, Plan)
            check_memory(result)
            planned[entry.label] = result
        except S2QError as error:
            obstacles[entry.label] = str(error)
    return planned, obstacles
