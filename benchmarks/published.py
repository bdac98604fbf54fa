"""Published models, from `published.yaml`, and what `s2q plan` says of them."""

import functools
from pathlib import Path
from typing import Any

import yaml

from s2q.planning import plan

GIB = 2**30
NOT_PLANNED = "not planned yet"


@functools.cache
def published_models() -> dict[str, dict[str, Any]]:
    """Return the models by name; `published.yaml` explains the fields."""
    text = Path(__file__).with_name("published.yaml").read_text(encoding="utf-8")
    models: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return models


def published_name(model: str) -> str | None:
    """Return the name of the published model that a Hub id means, None if it means none.

    Args:
        model: A Hub id, or anything else that names a model.
    """
    for name, entry in published_models().items():
        if model.lower() in {one.lower() for one in (entry["hub"], *entry["also"])}:
            return name
    return None


def planned_peak(planned: Any) -> str:
    """Return the largest memory of the stages of a plan; nothing where one is unknown."""
    peaks = [stage.peak_memory_bytes for stage in planned.stages]
    return NOT_PLANNED if None in peaks else f"{max(peaks) / GIB:.1f} GiB"


def planned_time(planned: Any) -> str:
    """Return the time of all stages of a plan; nothing where one is unknown."""
    seconds = [stage.seconds for stage in planned.stages]
    return NOT_PLANNED if None in seconds else f"{sum(seconds) / 3600:.1f} h"


@functools.cache
def plan_of(synthetic: str, recipe: str, *overrides: str) -> Any:
    """Return the plan of a model by its dimensions, without its weights."""
    return plan(f"synthetic:{synthetic}", recipe, overrides=overrides)
