"""The index of a pipeline's folder: the class of the pipeline, and library and class of each component."""

import json
import logging
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2q.common.errors import InvalidInputError, short_repr
from s2q.common.files import atomic_write_json, canonical_json, read_json
from s2q.common.foreign_code import LIBRARIES

logger = logging.getLogger(__name__)

INDEX = "model_index.json"
MODULAR_INDEX = "modular_model_index.json"
INDEXES = (INDEX, MODULAR_INDEX)
_SPEC = 2
"""Position, in an entry of modular_model_index.json, of where the component is loaded from."""

_FILES = (".jinja", ".json", ".model", ".txt")
"""Suffixes of what is copied of a component that is not loaded: no code, no weights."""


@dataclass(frozen=True, kw_only=True)
class Modular:
    """A modular pipeline of diffusers that s2q runs.

    Attributes:
        module: Module of this package with its class.
        class_name: That class.
        blocks: Class of diffusers with its steps.
        components: What is loaded of the model; others, such as a second transformer for another task, are left out.
        files: Library and class of further components, which checkpoints have as files: diffusers' own pipeline loads
            them, and text to video does not need them.
    """

    module: str
    class_name: str
    blocks: str
    components: tuple[str, ...]
    files: Mapping[str, tuple[str, str]]


MODULAR = {
    "MiniMaxH3ModularPipeline": Modular(
        module="minimax_h3",
        class_name="MiniMaxH3Pipeline",
        blocks="MiniMaxH3Blocks",
        components=("text_encoder", "tokenizer", "transformer", "vae", "audio_vae", "scheduler", "audio_scheduler"),
        files={"processor": ("transformers", "Qwen3VLProcessor")},
    ),
}
"""The modular pipelines that s2q runs, by their class in diffusers."""


def modular_of(index: Mapping[str, Any]) -> Modular | None:
    """Return what is known of the modular pipeline of an index; None of another pipeline."""
    return MODULAR.get(str(index.get("_class_name")))


def find_index(folder: Path) -> Path:
    """Return the index of a pipeline's folder; model_index.json, which is not there, if it has none."""
    return next((folder / name for name in INDEXES if (folder / name).is_file()), folder / INDEX)


def read_index(folder: Path, *, remedy: str) -> dict[str, Any]:
    """Read the index of a pipeline's folder; a modular one is returned as model_index.json would have it.

    Args:
        remedy: What to do about a damaged file.

    Returns:
        `[library, class]` of each component that is loaded, beside `_class_name` and the options of the pipeline.

    Raises:
        InvalidInputError: If it is damaged, or a modular pipeline that s2q does not run, or lacks a component.
    """
    path = find_index(folder)
    index = read_json(path, remedy=remedy)
    if path.name == INDEX:
        return index
    known = modular_of(index)
    if known is None:
        raise InvalidInputError(
            f"{path}: {short_repr(index.get('_class_name'))} is a modular pipeline of a kind that s2q does not run; "
            f"expected {' or '.join(MODULAR)}, or a folder with {INDEX}"
        )
    options = {name: value for name, value in index.items() if not isinstance(value, list)}
    return options | {name: _entry(path, name, index.get(name), remedy=remedy) for name in known.components}


def modular_index(
    class_name: str, entries: Mapping[str, tuple[str, str]], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the contents of modular_model_index.json of components in folders of their names.

    No repository is named: diffusers takes the components that are beside the index from there.

    Args:
        class_name: Of the modular pipeline in diffusers.
        entries: Library and class by component.
        options: Of the pipeline.
    """
    specs = {name: _spec(*entry, name) for name, entry in entries.items()}
    return {"_class_name": class_name, "_blocks_class_name": MODULAR[class_name].blocks, **options, **specs}


def pinned_index(content: bytes, repo: str, *, revision: str | None = None) -> bytes:
    """Return modular_model_index.json with the components in a repository of the Hub, as diffusers needs it there.

    Args:
        revision: Branch of the repository; None is its main branch.
    """
    index = json.loads(content)
    for name, value in index.items():
        if _is_spec(value):
            value[_SPEC] |= _location(name, repo, revision)
    return canonical_json(index).encode()


def modular_components(index: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the components that checkpoints and runs of a modular pipeline need; none of another pipeline."""
    known = modular_of(index)
    return () if known is None else (*known.components, *known.files)


def copy_files(source: Path, target: Path, *, strange: Callable[[Path], Collection[str]]) -> None:
    """Copy the components of a modular pipeline that s2q does not load, for those who run the copy with diffusers.

    Args:
        source: Folder of the original.
        target: Folder with an index, which gets them too.
        strange: Returns the files of a folder that are not to be copied, by path relative to it.
    """
    path = find_index(target)
    index = read_json(path, remedy="save the model again")
    known = modular_of(index)
    if known is None:
        return
    left_out = strange(source)
    for component, entry in known.files.items():
        folder = source / component
        names = sorted(file.name for file in folder.glob("*") if file.suffix in _FILES) if folder.is_dir() else []
        for name in names:
            if f"{component}/{name}" in left_out:
                logger.warning("%s: leads out of the folder, not copied", folder / name)
                continue
            (target / component).mkdir(exist_ok=True)
            shutil.copyfile(folder / name, target / component / name)
        if (target / component).is_dir():
            index[component] = _spec(*entry, component)
    atomic_write_json(path, index)


def _spec(library: str, class_name: str, name: str) -> list[Any]:
    return [library, class_name, {"type_hint": [library, class_name], **_location(name, None, None)}]


def _location(name: str, repo: str | None, revision: str | None) -> dict[str, Any]:
    return {"pretrained_model_name_or_path": repo, "subfolder": name, "variant": None, "revision": revision}


def _is_spec(value: Any) -> bool:
    return isinstance(value, list) and len(value) == _SPEC + 1 and isinstance(value[_SPEC], dict)


def _entry(path: Path, name: str, value: Any, *, remedy: str) -> list[str]:
    """Library and class of a component; the index says them twice, and once where it was not loaded when saved."""
    library, class_name, spec = value if _is_spec(value) else (None, None, {})
    found = [library, class_name] if library and class_name else spec.get("type_hint")
    if not (isinstance(found, list) and len(found) == 2 and all(isinstance(word, str) for word in found)):
        raise InvalidInputError(f"{path}: has no {name}, or not its class, which s2q needs; {remedy}")
    if found[0] not in LIBRARIES:
        raise InvalidInputError(
            f"{path}: {name} is {short_repr(found)}; expected a class of {' or '.join(LIBRARIES)}; {remedy}"
        )
    if (subfolder := spec.get("subfolder", name)) != name:
        raise InvalidInputError(
            f"{path}: {name} is in {short_repr(subfolder)}; expected a folder of its name; rename it here and there"
        )
    return found
