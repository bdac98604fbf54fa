"""Recipes beside each other before any compute: bytes, memory, estimated time, and the error that was measured.

The errors are those of the embedded models, `measured.yaml`; of another model they say how recipes rank, not how large
its errors will be.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml

from s2q.common.errors import InvalidInputError
from s2q.models import ModelSource, resolve_model
from s2q.models.synthetic import SYNTHETIC_PREFIX
from s2q.planning.plan import plan
from s2q.recipes.load import load_recipe


def compare_recipes(
    model: str | Path | ModelSource,
    recipes: Iterable[str],
    *,
    overrides: Sequence[str] = (),
    device: str = "cpu",
    device_memory: int | str | None = None,
    memory_budget: int | str | None = None,
    dtype: torch.dtype | str | None = None,
    variant: str | None = None,
    offload: str = "auto",
) -> list[dict[str, Any]]:
    """Plan recipes for a model; see `plan` for the arguments.

    Returns:
        For each recipe plain data: `recipe`; `storage`, `peak_memory_bytes` and `estimate` as in a plan;
        `velocity_relative_error` by embedded model, where it was measured. A recipe that does not fit the model has
        `refused` instead, with the reason.

    Raises:
        InvalidInputError: If the model or a recipe is unknown, the model is quantized, or no recipe fits it.
    """
    if not (isinstance(model, ModelSource) or str(model).startswith(SYNTHETIC_PREFIX)):
        model = resolve_model(model, variant=variant)
    measured = {} if overrides else measured_errors()  # of unchanged recipes
    rows, fits = [], False
    for recipe, validated in [(name, load_recipe(name, overrides=overrides)) for name in recipes]:
        row: dict[str, Any] = {"recipe": recipe, "velocity_relative_error": measured.get(recipe, {})}
        try:
            planned = plan(
                model,
                recipe=validated,
                device=device,
                device_memory=device_memory,
                memory_budget=memory_budget,
                dtype=dtype,
                variant=variant,
                offload=offload,
            ).to_dict()
        except InvalidInputError as error:
            rows.append(row | {"refused": str(error)})
            continue
        peaks = [stage["peak_memory_bytes"] for stage in planned["stages"]]
        peak = None if None in peaks else max(peaks)
        rows.append(row | {"storage": planned["storage"], "peak_memory_bytes": peak, "estimate": planned["estimate"]})
        fits = True
    if not fits:
        raise InvalidInputError(rows[0]["refused"] if rows else "recipes: got none; expected names, or all")
    return rows


@functools.cache
def measured_errors() -> Mapping[str, Mapping[str, float]]:
    """Return the mean velocity error of each measured recipe on embedded models, by recipe and model."""
    text = resources.files("s2q.planning").joinpath("measured.yaml").read_text(encoding="utf-8")
    content: dict[str, dict[str, float]] = yaml.safe_load(text)
    return content
