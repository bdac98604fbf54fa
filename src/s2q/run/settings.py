"""The options of a run, checked: settings, recipe and model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from s2q.common import arguments
from s2q.common.errors import UsageError
from s2q.common.memory import Offload
from s2q.engines.options import Workers
from s2q.models import ModelSource, resolve_model
from s2q.models.lora import with_loras
from s2q.recipes.load import checked_overrides, load_recipe
from s2q.recipes.schema import Recipe


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Checked options of a run; `quantize` documents them."""

    seed: int
    dtype: torch.dtype | None
    variant: str | None
    loras: tuple[str, ...]
    max_shard_size: int
    memory_budget: int | None
    workers: Workers
    offload: Offload | Literal["auto"]
    resume: bool
    overwrite: bool

    @property
    def device(self) -> str:
        """The device of this process."""
        return self.workers.device


def recipe_argument(
    recipe: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str], *, samples: int | None
) -> Recipe:
    """Return the validated recipe, with the number of samples that was asked for."""
    overrides = checked_overrides(overrides)  # an iterator would be empty the second time
    validated = load_recipe(recipe, overrides=overrides)
    if samples is None:
        return validated
    arguments.whole_number("samples", samples, least=1)
    if not validated.calibrates:
        raise UsageError(f"samples (--samples): recipe {validated.name} uses no calibration samples; remove --samples")
    return load_recipe(recipe, overrides=[*overrides, f"calibration.samples={samples}"])


def source_of(model: Any, settings: RunSettings) -> ModelSource | None:
    """Return the model's files; None for a loaded pipeline."""
    if isinstance(model, str | Path | ModelSource):
        return with_loras(resolve_model(model, variant=settings.variant), settings.loras)
    if settings.loras:
        raise UsageError("quantize: loras are for models by name or folder; fuse them into the pipeline by fuse_lora()")
    if settings.variant is not None:
        raise UsageError("quantize: variant is for models by name or folder; load the pipeline with variant=")
    settings.workers.check_alone("quantize")
    return None
