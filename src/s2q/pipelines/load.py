"""Load a pipeline from its folder, by diffusers or, of a modular one, component by component."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from s2q.common.errors import InvalidInputError
from s2q.common.weight_files import has_variant, names_in
from s2q.pipelines.index import MODULAR, modular_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def pipeline_type(class_name: str) -> Any:
    """Return the class that s2q runs for the pipeline class of an index: one of diffusers, or its stand-in here.

    The name of a stand-in is understood too.
    """
    import diffusers

    known = MODULAR.get(loading_class(class_name))
    if known is None:
        return getattr(diffusers, class_name)
    return getattr(importlib.import_module(f"s2q.pipelines.{known.module}"), known.class_name)


def loading_class(class_name: str) -> str:
    """Return the class of diffusers that loads what a pipeline class saves, given the name that s2q runs."""
    return next((name for name, known in MODULAR.items() if known.class_name == class_name), class_name)


def load_pipeline(
    folder: Path,
    index: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    variant: str | None,
    components: Mapping[str, Any],
) -> DiffusionPipeline:
    """Load a pipeline from a folder, weights from safetensors only.

    Args:
        index: What `read_index` returns.
        components: Those that are loaded already, by name.
    """
    from diffusers import DiffusionPipeline

    known = modular_of(index)
    if known is None:
        return DiffusionPipeline.from_pretrained(
            folder, dtype=dtype, variant=variant, use_safetensors=True, **components
        )
    parts = {name: components.get(name) for name in known.components}
    for name in [name for name, part in parts.items() if part is None]:
        parts[name] = _load(folder.resolve() / name, *index[name], dtype=dtype, variant=variant)
    pipeline_class = pipeline_type(index["_class_name"])
    options = {name: value for name, value in index.items() if not (name.startswith("_") or isinstance(value, list))}
    taken = inspect.signature(pipeline_class).parameters.keys() & options.keys()
    pipe = pipeline_class(**parts, **{name: options.pop(name) for name in taken})
    pipe.register_to_config(_name_or_path=str(folder))
    pipe.other_options = options
    return pipe


def _load(folder: Path, library: str, class_name: str, *, dtype: torch.dtype, variant: str | None) -> Any:
    if not folder.is_dir():
        raise InvalidInputError(f"{folder} is missing, which the pipeline needs; download or save the model again")
    part_class = getattr(importlib.import_module(library), class_name)
    if not issubclass(part_class, torch.nn.Module):
        return part_class.from_pretrained(folder, local_files_only=True)
    used = variant if has_variant(names_in(folder), variant) else None
    options = {"dtype": dtype, "variant": used, "use_safetensors": True, "local_files_only": True}
    return part_class.from_pretrained(folder, **options)
