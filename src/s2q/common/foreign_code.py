"""Refuse a pipeline's folder that would make a loader run code which the folder contains or names.

s2q never passes `trust_remote_code`, so diffusers and transformers refuse or ask, each in its own words. Nor are nested
pipelines and adapters loaded, for which the settings of the outer loader (`use_safetensors`) do not hold.
"""

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from s2q.common.errors import InvalidInputError, short_repr
from s2q.common.files import is_plain_name, read_json

LIBRARIES = ("diffusers", "transformers")
_NESTED = ("model_index.json", "modular_model_index.json", "adapter_config.json")
_DATA = ("tokenizer.json", "vocab.json")  # long, and without settings
_REMEDY = "download or save the model again"


def check_index(path: Path, index: Mapping[str, Any]) -> None:
    """Refuse a model_index.json that names other code than that of installed libraries, or other folders."""
    class_name = index.get("_class_name", "")
    if not isinstance(class_name, str):
        raise InvalidInputError(
            f"{path}: _class_name={short_repr(class_name)} is a pipeline with code of its own; expected the name of a "
            "class of diffusers; s2q runs no code of a model"
        )
    for name, (library, component_class) in component_entries(index).items():
        entry = f"{short_repr(name)} is {short_repr([library, component_class])}"
        if not is_plain_name(name):
            raise InvalidInputError(f"{path}: {entry}; expected the name of a folder beside it; {_REMEDY}")
        if not isinstance(component_class, str) or not component_class.isidentifier():
            raise InvalidInputError(f"{path}: {entry}; expected a library and a class; {_REMEDY}")
        if not _is_known(library):
            raise InvalidInputError(
                f"{path}: {entry}; expected a class of diffusers or transformers; s2q imports no other library because "
                "a model names it"
            )


def check_folder(folder: Path, index: Mapping[str, Any]) -> None:
    """Refuse components with code, kernels, pipelines or adapters of their own, and unreadable configurations."""
    check_index(folder / "model_index.json", index)
    for name, (library, component_class) in component_entries(index).items():
        component = folder / name
        for inner in (*_NESTED, f"{library}.py"):
            if (component / inner).exists():
                raise InvalidInputError(
                    f"{component / inner}: not loaded; expected the files of one {component_class}; remove it, or load "
                    "the pipeline with diffusers and save it again"
                )
        for path in sorted(component.glob("*.json")):
            if path.name not in _DATA:
                _check_settings(path, read_json(path, remedy=_REMEDY), is_auto=component_class.startswith("Auto"))


def component_entries(index: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Return library and class of each component that a model_index.json names."""
    return {
        name: (entry[0], entry[1])
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)
    }


def _is_known(library: str) -> bool:
    if library in LIBRARIES or library in sys.modules:  # what the user has imported
        return True
    diffusers = importlib.util.find_spec("diffusers")
    locations = None if diffusers is None else diffusers.submodule_search_locations
    return is_plain_name(library) and any((Path(root) / "pipelines" / library).is_dir() for root in locations or ())


def _check_settings(path: Path, settings: Mapping[str, Any], *, is_auto: bool) -> None:
    if is_auto and "auto_map" in settings:
        raise InvalidInputError(f"{path}: auto_map names code in the model's repository; s2q runs no code of a model")
    for key, value in _items(settings):
        if "_implementation" in key and any(
            isinstance(inner, str) and "/" in inner for _, inner in _items({"": value})
        ):
            raise InvalidInputError(
                f"{path}: {key}={short_repr(value)} names a kernel on the Hub; s2q runs no code of a model; remove it"
            )


def _items(content: Any) -> Iterator[tuple[str, Any]]:
    """All keys with their values in nested JSON; items of lists have an empty key."""
    stack = [content]
    while stack:
        value = stack.pop()
        inner = list(value.items()) if isinstance(value, Mapping) else [("", item) for item in value]
        yield from inner
        stack += [item for _, item in inner if isinstance(item, Mapping | list)]
