"""An export that is a pipeline folder: the transformers rewritten, every other component copied."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from torch import Tensor

from s2q.checkpoint.manifest import listed_files, strange_files
from s2q.checkpoint.save import LICENCE, copy_top_files
from s2q.common.cards import CARD, read_card, split_card
from s2q.common.errors import InvalidInputError
from s2q.common.files import atomic_write_json, atomic_write_text
from s2q.common.records import CONVERSION_RECORD, EXPORT_RECORD
from s2q.common.weight_files import copy_component, weight_files
from s2q.models import ModelSource
from s2q.pipelines import INDEXES, copy_files, modular_components

_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"
_TOP = (*INDEXES, "generation.json", LICENCE)


def exported_files(folder: Path) -> set[str] | None:
    """Return the files of a folder that an export wrote, by relative POSIX path; None for another folder."""
    return listed_files(folder) if (folder / EXPORT_RECORD).is_file() else None


def converted_files(folder: Path) -> set[str] | None:
    """Return the same of a folder that a conversion wrote."""
    return listed_files(folder) if (folder / CONVERSION_RECORD).is_file() else None


def check_components(source: ModelSource, folder: Path, *, without: Collection[str]) -> None:
    """Refuse what `copy_components` would copy from outside of the folder, or from something that is no file."""
    copied = {*source.component_classes, *modular_components(source.index)} - set(without)
    for name, what in strange_files(folder).items():
        top = name.partition("/")[0]
        if top in copied or any(fnmatch.fnmatchcase(name, pattern) for pattern in (*_TOP, CARD)):
            raise InvalidInputError(
                f"{folder / name}: {what}, which is not copied; put the file itself there, or remove it"
            )


def copy_components(source: ModelSource, folder: Path, staged: Path, *, without: Collection[str]) -> None:
    """Copy the components of a pipeline folder, except some, and its licence; weights get names without a variant."""
    copy_top_files(folder, staged, *_TOP)
    copy_files(folder, staged, strange=strange_files)
    for component, (library, _) in source.component_classes.items():
        if component not in without and (folder / component).is_dir():
            copy_component(folder / component, staged / component, library=library, variant=source.variant)


def write_transformer(
    folder: Path, tensors: dict[str, Tensor], config: Mapping[str, Any], *, max_shard_size: int
) -> None:
    """Write a transformer as diffusers saves one, into a new folder."""
    from huggingface_hub import save_torch_state_dict

    folder.mkdir()
    save_torch_state_dict(tensors, folder, filename_pattern=_PATTERN, max_shard_size=max_shard_size)
    atomic_write_json(folder / "config.json", dict(config))


def read_tensors(folder: Path, *, library: str = "diffusers") -> dict[str, Tensor]:
    """Read the tensors of a component that was written by diffusers or transformers."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder, library=library):
        tensors |= load_file(path)
    return tensors


def write_card(
    source: Path, staged: Path, text: str, *, fields: Mapping[str, Any] | None = None, ignored: Collection[str] = ()
) -> None:
    """Write a model card with the front matter of the source's card, where it has one.

    Args:
        fields: Front matter to add where the source's has none of a name; tags are added to its tags.
        ignored: Names in the source's front matter that are not taken where there are `fields`.
    """
    card = source / CARD
    front = split_card(card.read_text(encoding="utf-8", errors="replace"))[0] if card.is_file() else None
    if fields is not None:
        there = {name: value for name, value in read_card(source).items() if name not in ignored}
        tags = there.get("tags") or []
        tags = [*(tags if isinstance(tags, list) else [tags]), *fields.get("tags", ())]
        merged = {**fields, **there, "tags": list(dict.fromkeys(map(str, tags)))}
        front = yaml.safe_dump(merged, sort_keys=False, allow_unicode=True)
    atomic_write_text(staged / CARD, text if front is None else f"---\n{front}---\n\n{text}")
