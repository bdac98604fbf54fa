"""Models that are already quantized: the method, the full-precision model that they were made from, and the refusal."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from s2q.common.cards import read_card
from s2q.common.components import TRANSFORMERS
from s2q.common.errors import InvalidInputError
from s2q.common.files import read_json
from s2q.models.hub import parse_hub_id

CONVERTED = ("sdnq",)
"""Methods whose pipeline folders `s2q convert` reads."""

_UNNAMED = "another method"
_REMEDY = "download or save the model again"
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

    That is a folder or Hub id in `_name_or_path` of a configuration, unless it is quantized itself, or `base_model` of
    the card in the folder.
    """
    named = (config.get("_name_or_path") for config in configs)
    places = [str(place) for place in named if isinstance(place, (str, Path)) and str(place)]
    here = [Path(place) for place in places if Path(place).is_dir()]
    base = None if folder is None else read_card(folder).get("base_model")
    base = base[0] if isinstance(base, list) and base else base
    candidates = [_name_of(path) for path in here if not _is_quantized(path)]
    candidates += [base] if isinstance(base, str) and base else []
    candidates += [place for place in places if not Path(place).exists() and parse_hub_id(place) is not None]
    return next(iter(candidates), None)


def _is_quantized(path: Path) -> bool:
    """Whether a folder of a transformer, or of its pipeline, has a quantized one."""
    configs = (path / "config.json", path / TRANSFORMERS[0] / "config.json")
    return any(file.is_file() and "quantization_config" in read_json(file, remedy=_REMEDY) for file in configs)


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
