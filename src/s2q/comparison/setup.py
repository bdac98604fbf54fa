"""A comparison before any compute: its options, everything that can be checked, and what it will do."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from s2q.common.arguments import dtype_name
from s2q.common.devices import emulated_dtypes
from s2q.common.errors import InvalidInputError, S2QError, UsageError
from s2q.common.files import sha256_file
from s2q.common.records import COMPARISON_VERSION
from s2q.comparison.entries import Entry, content_of, content_of_files, find_entries
from s2q.engines.options import Workers
from s2q.evaluation.definitions import version_of
from s2q.evaluation.evaluate import default_prompts
from s2q.evaluation.judges.learned import open_judges
from s2q.evaluation.summary import versions
from s2q.evaluation.video_metrics import selected_metrics
from s2q.generation.defaults import generation_defaults, with_first_frames
from s2q.generation.generate import batch_size_for, settings_for
from s2q.generation.load import check_model, check_same_loras, pipeline_to_ask
from s2q.generation.prompts import check_distinct, prompt_record
from s2q.generation.settings import check_prompts, resolve_settings
from s2q.models import ModelSource, family_of, resolve_model
from s2q.models.architecture import architecture_of, check_comparable, warn_of_scheduler
from s2q.models.lora import with_loras
from s2q.models.source import check_full_precision
from s2q.planning import Plan, check_memory
from s2q.planning.workload import calibration_settings, recommended_for
from s2q.run.quantize import quantize
from s2q.shapes.embedded import EMBEDDED_NAMES

logger = logging.getLogger(__name__)

SHARD_PROMPTS = 8
"""Prompts that are evaluated together; results do not depend on how many workers share the shards."""

_NOT_COMMON = ("entries", "paths", "variant", "loras", "verify", "offload")
_PACKAGES = ("s2q", "torch", "diffusers", "transformers")


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """Checked arguments of `compare`, which documents them; `requested` are generation settings by name."""

    entries: tuple[str, ...]
    peers: tuple[str, ...]
    model: str
    out: Path
    prompts: list[str] | None
    num_prompts: int
    seeds: tuple[int, ...]
    calibration_prompts: list[str] | None
    seed: int
    samples: int | None
    overrides: tuple[str, ...]
    metrics: tuple[str, ...]
    lpips_weights: Path | None
    clip: Path | None
    requested: Mapping[str, Any]
    dtype: str | None
    variant: str | None
    loras: tuple[str, ...]
    verify: bool | None
    workers: Workers
    offload: str
    resume: bool
    overwrite: bool
    dry_run: bool

    @property
    def device(self) -> str:
        """The device of this process."""
        return self.workers.device


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Everything that the results of a comparison depend on, as plain data; stored in compare_run.json.

    Attributes:
        content: What tells the reference apart from others.
        metrics: Version of each metric to compute, by name.
        judges: Weights of learned judges by name, `lpips` and `clip`: their path, and what tells them apart.
        dtype: Compute dtype; None is the stored one, or float32 in place of an emulated one.
        device: "cpu" or "cuda".
        emulated: Dtypes that the device emulates.
        calibration_prompts: None means the model's own.
        entries: What each entry's results depend on, by label.
        paths: What checkpoints are loaded by, by label; no result depends on it, nor on `variant`, `loras`
            (their contents are in `content`), `verify` and `offload`.
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
    loras: tuple[str, ...] = ()
    verify: bool | None = None
    offload: str = "auto"

    def source(self) -> ModelSource:
        """Return the full-precision model, with its adapters."""
        return with_loras(resolve_model(self.model, variant=self.variant), self.loras)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, with its `schema_version`."""
        recorded = {
            name: None if prompts is None else list(map(prompt_record, prompts))
            for name, prompts in (("prompts", self.prompts), ("calibration_prompts", self.calibration_prompts))
        }
        return {"schema_version": COMPARISON_VERSION, **asdict(self), **recorded}

    def judge(self, name: str) -> Path | None:
        """Return where the weights of a learned judge are, `lpips` or `clip`; None without them."""
        return Path(self.judges[name]["path"]) if name in self.judges else None

    def common(self) -> dict[str, Any]:
        """Return what the results of all entries depend on."""
        return {name: value for name, value in self.to_dict().items() if name not in _NOT_COMMON}

    def shards(self) -> list[list[str]]:
        """Return the prompts, `SHARD_PROMPTS` at a time."""
        starts = range(0, len(self.prompts), SHARD_PROMPTS)
        return [list(self.prompts[start : start + SHARD_PROMPTS]) for start in starts]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A comparison that has passed all checks; by label, plans of recipes and why others cannot take the model."""

    plan: RunPlan
    source: ModelSource
    entries: tuple[Entry, ...]
    planned: Mapping[str, Plan]
    obstacles: Mapping[str, str]
    batch_size: int


def set_up(settings: CompareSettings) -> Setup:
    """Find and check everything that a comparison needs, before any compute."""
    if not (settings.entries or settings.peers):
        raise UsageError("compare: got nothing to compare; name recipes (all, s2q-*), checkpoint folders or --peers")
    weights = {"lpips": settings.lpips_weights, "clip": settings.clip}
    open_judges(lpips_weights=settings.lpips_weights, clip=settings.clip, device="cpu")  # refuses what is none
    lpips, clip = settings.lpips_weights is not None, settings.clip is not None
    metrics = selected_metrics(settings.metrics, lpips=lpips, clip=clip)
    samples = () if settings.samples is None else (f"calibration.samples={settings.samples}",)
    entries = find_entries(
        settings.entries,
        peers=settings.peers,
        overrides=(*settings.overrides, *samples),
        variant=settings.variant,
        verify=settings.verify,
    )
    source = with_loras(resolve_model(settings.model, variant=settings.variant), settings.loras)
    check_full_precision(source)
    check_model(source)
    family_of(source.transformer_class)
    reference = architecture_of(source, label=source.name)
    for entry in entries:
        if entry.source is not None:
            ours = architecture_of(entry.source, label=entry.given)
            check_comparable(ours, reference)
            check_same_loras(entry.source, source)
            warn_of_scheduler(ours, reference)
    texts = with_first_frames(source, settings.prompts or default_prompts(settings.model, count=settings.num_prompts))
    check_distinct(texts)
    _check_calibration(entries, source, settings)
    pipe = pipeline_to_ask(source)
    recommended = generation_defaults(source) | _calibrated_generation(entries)
    generation = settings_for(pipe, settings.requested, defaults=recommended)
    check_prompts(pipe, texts, generation)
    planned, obstacles = _plans(entries, source, settings)
    for entry in entries:
        if entry.label in planned or entry.peer is not None:
            _check_calibration_prompts(pipe, source, entry, settings.calibration_prompts)
    return Setup(
        plan=RunPlan(
            model=settings.model if source.hub is None else source.pinned,
            content=content_of(source),
            prompts=tuple(texts),
            seeds=settings.seeds,
            settings=generation.to_dict(),
            metrics={name: version_of(name) for name in metrics},
            judges={name: _weights_at(path) for name, path in weights.items() if path is not None},
            dtype=settings.dtype,
            device=settings.device.partition(":")[0],
            emulated=tuple(map(dtype_name, emulated_dtypes(settings.device))),
            calibration_prompts=None if settings.calibration_prompts is None else tuple(settings.calibration_prompts),
            seed=settings.seed,
            versions={name: version for name, version in versions().items() if name in _PACKAGES},
            entries={entry.label: entry.identity() for entry in entries},
            paths={entry.label: entry.path for entry in entries if entry.path is not None},
            variant=settings.variant,
            loras=tuple(str(lora) for lora in source.loras),
            verify=settings.verify,
            offload=settings.offload,
        ),
        source=source,
        entries=tuple(entries),
        planned=planned,
        obstacles=obstacles,
        batch_size=batch_size_for(pipe, generation),
    )


def _calibrated_generation(entries: Sequence[Entry]) -> dict[str, Any]:
    """The generation settings that all entries which calibrate do so with; empty, with a warning, if they differ."""
    calibrated = {entry.label: entry.generation for entry in entries if entry.generation is not None}
    first = next(iter(calibrated.values()), {})
    for label, generation in calibrated.items():
        if generation != first:
            logger.warning(
                "%s was calibrated with other generation settings than %s (%s): all are judged with the model's; pass "
                "--steps and --guidance-scale for others",
                *(label, next(iter(calibrated)), _differing(generation, first)),
            )
            return {}
    return dict(first)


def _differing(settings: Mapping[str, Any], others: Mapping[str, Any]) -> str:
    """The settings that differ, with both values: "shift 8.0 against the model's"."""
    pairs = {name: (settings.get(name), others.get(name)) for name in sorted({*settings, *others})}
    shown = {name: ["the model's" if value is None else value for value in pair] for name, pair in pairs.items()}
    return ", ".join(f"{name} {first} against {second}" for name, (first, second) in shown.items() if first != second)


def _weights_at(path: Path) -> dict[str, Any]:
    """Path of weights, with the hashes that identify them."""
    path = path.expanduser().resolve()
    weights = sha256_file(path) if path.is_file() else content_of_files(path, path.iterdir())
    return {"path": str(path), "weights": weights}


def _check_calibration(entries: Sequence[Entry], source: ModelSource, settings: CompareSettings) -> None:
    calibrating = [entry.label for entry in entries if entry.calibrates]
    if settings.calibration_prompts is None:
        if calibrating and source.name not in EMBEDDED_NAMES:
            raise InvalidInputError(
                f"{', '.join(calibrating)} need calibration prompts; pass --calibration-prompts FILE "
                "(calibration_prompts=[...] in Python)"
            )
    elif not calibrating:
        raise UsageError("compare: calibration prompts were given, but no recipe or peer calibrates; remove them")
    else:
        check_distinct(settings.calibration_prompts)


def _check_calibration_prompts(pipe: Any, source: ModelSource, entry: Entry, prompts: Sequence[str] | None) -> None:
    """Check that the settings with which an entry calibrates take the prompts that it calibrates on."""
    if prompts is None or not entry.calibrates:
        return
    recommended = recommended_for(source)
    if entry.recipe is None:
        used, settings = prompts, resolve_settings(pipe, defaults=recommended)
    else:
        group = entry.recipe.calibration
        used, settings = prompts[: group.n_prompts], calibration_settings(pipe, group, recommended=recommended)
    check_prompts(pipe, with_first_frames(source, used), settings)


def _plans(
    entries: Sequence[Entry], source: ModelSource, settings: CompareSettings
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
                prompts=settings.calibration_prompts if entry.recipe.calibrates else None,
                dry_run=True,
                device=settings.device,
                dtype=settings.dtype,
                offload=settings.offload,
            )
            assert isinstance(result, Plan)
            check_memory(result)
            planned[entry.label] = result
        except S2QError as error:
            obstacles[entry.label] = str(error)
    return planned, obstacles
