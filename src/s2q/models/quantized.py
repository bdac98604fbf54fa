"""Models that are already quantized: the method, the full-precision model that they were made from, and the refusal."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from s2q.common.cards import files_and_base, read_card
from s2q.common.components import TRANSFORMERS
from s2q.common.errors import InvalidInputError
from s2q.common.files import existing_folder, read_json
from s2q.common.records import CONVERSION_RECORD, REPORT
from s2q.models.hub import parse_hub_id

CONVERTED = ("sdnq",)
"""Methods whose pipeline folders `s2q convert` reads."""

_UNNAMED = "another method"
_REMEDY = "download or save the model again"
_MAX_NAME = 300
_CACHED = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/")
_PACKAGES = {
    "auto_round": "auto-round",
    "bitsandbytes": "bitsandbytes",
    "comfy_kitchen": "comfy-kitchen",
    "diffusers.quantizers.gguf": "gguf",
    "modelopt": "modelopt",
    "optimum": "quanto",
    "sdnq": "sdnq",
    "torchao": "torchao",
}
"""Methods by the package of their modules and tensors."""


def full_precision_origin(folder: Path | None, *configs: Mapping[str, Any]) -> str | None:
    """Return the full-precision model that a quantized one was made from, as far as its files tell.

    That is a folder or Hub id in `_name_or_path` of a configuration, unless it is quantized itself, or in the folder
    `base_model` of the card or `source` of the record of s2q, first of all if that names a file.
    """
    recorded = None if folder is None else _recorded_source(folder)
    if recorded is not None and files_and_base(recorded)[0] is not None:
        return recorded
    named = (config.get("_name_or_path") for config in configs)
    places = [str(place) for place in named if isinstance(place, (str, Path)) and _is_name(str(place))]
    here = [(place, existing_folder(place)) for place in places]
    base = None if folder is None else read_card(folder).get("base_model")
    base = base[0] if isinstance(base, list) and base else base
    candidates = [_name_of(path) for _, path in here if path is not None and _is_full_precision(path)]
    candidates += [base] if _is_name(base) else []
    candidates += [place for place, path in here if path is None and parse_hub_id(place) is not None]
    return next(iter(candidates), recorded)


def _is_name(value: Any) -> bool:
    """Whether a value of a file may name a model; it comes from strangers and goes into messages."""
    return isinstance(value, str) and 0 < len(value) <= _MAX_NAME and value.isprintable()


def _is_full_precision(path: Path) -> bool:
    """Whether a folder of a transformer, or of its pipeline, can be read and has none that is quantized."""
    configs = (path / "config.json", path / TRANSFORMERS[0] / "config.json")
    try:
        return not any(file.is_file() and "quantization_config" in read_json(file, remedy=_REMEDY) for file in configs)
    except InvalidInputError:
        return False


def _recorded_source(folder: Path) -> str | None:
    """The full-precision model that a record of s2q names; a conversion that knows none names what it converted."""
    for record in (CONVERSION_RECORD, REPORT):
        try:
            content = read_json(folder / record, remedy=_REMEDY) if (folder / record).is_file() else {}
        except InvalidInputError:
            continue
        source = content.get("source")
        if _is_name(source) and source != content.get("converted"):
            return str(source)
    return None


def _name_of(path: Path) -> str:
    """The Hub id of a folder in the Hub's cache, the name of an embedded model, or the folder of the pipeline."""
    from s2q.shapes.embedded import EMBEDDED_NAMES, embedded_folder

    folder = path.parent if path.name in TRANSFORMERS else path
    if cached := _CACHED.search(folder.as_posix()):
        return f"{cached[1]}/{cached[2]}"
    embedded = (name for name in EMBEDDED_NAMES if folder.resolve() == embedded_folder(name).resolve())
    return next(embedded, str(folder))


def already_quantized(name: str, component: str, method: Any, *, origin: str | None = None) -> InvalidInputError:
    """Build (not raise) the error for a model that has to be in full precision.

    Args:
        name: Of the model.
        component: Its quantized component.
        method: Its `quant_method`.
        origin: What `full_precision_origin` returned.
    """
    method = getattr(method, "value", method) or _UNNAMED
    converts = "; s2q convert keeps its codes if they are int4 or int8" if method in CONVERTED else ""
    return InvalidInputError(
        f"{name}: its {component} is already quantized (by {method}); pass the full-precision model, "
        f"{origin or 'the one that it was made from'}{converts}"
    )


def quantization_method(transformer: nn.Module) -> str | None:
    """Return what has quantized a loaded transformer, by diffusers or by itself; None for full precision."""
    if getattr(transformer, "is_quantized", False):
        method = getattr(transformer, "quantization_method", None)
        return str(getattr(method, "value", method) or _UNNAMED)
    kinds = {type(module) for module in transformer.modules()}
    kinds |= {type(value) for parameter in transformer.parameters() for value in (parameter, parameter.data)}
    modules = {f"{kind.__module__}." for kind in kinds}
    return next(
        (method for package, method in _PACKAGES.items() if any(name.startswith(f"{package}.") for name in modules)),
        None,
    )
