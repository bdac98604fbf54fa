"""The index of a pipeline's folder: the class of the pipeline, and library and class of each component."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2q.common.files import canonical_json, read_json

INDEX = "model_index.json"
MODULAR_INDEX = "modular_model_index.json"
INDEXES = (INDEX, MODULAR_INDEX)
_SPEC = 2
"""Position, in an entry of modular_model_index.json, of where the component is loaded from."""


@dataclass(frozen=True, kw_only=True)
class Modular:
    """A modular pipeline of diffusers that s2q runs.

    Attributes:
        module: Module of this package with its class.
        class_name: That class.
        blocks: Class of diffusers with its steps.
        components: What is loaded of the model; others, such as a second transformer for another task, are left out.
        files: Further components, which checkpoints have as files: text to video does not need them.
    """

    module: str
    class_name: str
    blocks: str
    components: tuple[str, ...]
    files: tuple[str, ...] = ()


MODULAR = {
    "MiniMaxH3ModularPipeline": Modular(
        module="minimax_h3",
        class_name="MiniMaxH3Pipeline",
        blocks="MiniMaxH3Blocks",
        components=("text_encoder", "tokenizer", "transformer", "vae", "audio_vae", "scheduler", "audio_scheduler"),
        files=("processor",),
    ),
}
"""The modular pipelines that s2q runs, by their class in diffusers."""


def find_index(folder: Path) -> Path:
    """Return the index of a pipeline's folder; model_index.json, which is not there, if it has none."""
    return next((folder / name for name in INDEXES if (folder / name).is_file()), folder / INDEX)


def read_index(folder: Path, *, remedy: str) -> dict[str, Any]:
    """Read the index of a pipeline's folder; a modular one is returned as model_index.json would have it.

    Args:
        remedy: What to do about a damaged file.

    Returns:
        `[library, class]` of each component that is loaded, beside `_class_name` and the options of the pipeline.
    """
    path = find_index(folder)
    index = read_json(path, remedy=remedy)
    if path.name == INDEX:
        return index
    known = MODULAR.get(str(index.get("_class_name")))
    return {
        name: _plain(value) if _is_spec(value) else value
        for name, value in index.items()
        if known is None or not _is_spec(value) or name in known.components
    }


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
    specs = {
        name: [library, component, {"type_hint": [library, component], **_location(None, name)}]
        for name, (library, component) in entries.items()
    }
    return {"_class_name": class_name, "_blocks_class_name": MODULAR[class_name].blocks, **options, **specs}


def pinned_index(content: bytes, repo: str) -> bytes:
    """Return modular_model_index.json with the components in a repository of the Hub, as diffusers needs it there."""
    index = json.loads(content)
    for name, value in index.items():
        if _is_spec(value):
            value[_SPEC] |= _location(repo, name)
    return canonical_json(index).encode()


def modular_components(index: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the components that checkpoints and runs of a modular pipeline need; none of another pipeline."""
    known = MODULAR.get(str(index.get("_class_name")))
    return () if known is None else (*known.components, *known.files)


def copy_files(source: Path, target: Path) -> None:
    """Copy the components of a modular pipeline that s2q does not load, for those who run the copy with diffusers."""
    name = read_json(find_index(target), remedy="save the model again").get("_class_name")
    known = MODULAR.get(str(name))
    for component in () if known is None else known.files:
        if (source / component).is_dir():
            shutil.copytree(source / component, target / component, copy_function=shutil.copyfile)


def _location(repo: str | None, name: str) -> dict[str, Any]:
    return {"pretrained_model_name_or_path": repo, "subfolder": name, "variant": None, "revision": None}


def _is_spec(value: Any) -> bool:
    return isinstance(value, list) and len(value) == _SPEC + 1 and isinstance(value[_SPEC], dict)


def _plain(value: list[Any]) -> list[Any]:
    """Library and class of a component; the index says them twice, and once where it was not loaded when saved."""
    library, class_name, spec = value
    return [library, class_name] if library and class_name else list(spec.get("type_hint") or (None, None))
