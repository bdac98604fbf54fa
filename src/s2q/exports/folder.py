"""An export that is a pipeline folder: the transformers rewritten, every other component copied."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from s2q.checkpoint.manifest import CARD
from s2q.common.files import atomic_write_json, atomic_write_text, read_json
from s2q.common.weight_files import weight_files

_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"
_TOP = ("model_index.json", "generation.json", "LICENSE*")
_MARK = "---\n"


def copy_components(source: Path, staged: Path, *, without: Mapping[str, Any], remedy: str) -> None:
    """Copy the components of a pipeline folder, except some, and its licence; links are followed."""
    for pattern in _TOP:
        for path in sorted(source.glob(pattern)):
            shutil.copyfile(path, staged / path.name)
    for component in read_json(source / "model_index.json", remedy=remedy):
        if component not in without and (source / component).is_dir():
            shutil.copytree(source / component, staged / component, copy_function=shutil.copyfile)


def write_transformer(
    folder: Path, tensors: dict[str, Tensor], config: Mapping[str, Any], *, max_shard_size: int
) -> None:
    """Write a transformer as diffusers saves one, into a new folder."""
    from huggingface_hub import save_torch_state_dict

    folder.mkdir()
    save_torch_state_dict(tensors, folder, filename_pattern=_PATTERN, max_shard_size=max_shard_size)
    atomic_write_json(folder / "config.json", dict(config))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a transformer that was written."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        tensors |= load_file(path)
    return tensors


def write_card(source: Path, staged: Path, text: str) -> None:
    """Write a model card with the front matter of the checkpoint's card, where it has one."""
    card = source / CARD
    content = card.read_text(encoding="utf-8") if card.is_file() else ""
    front = content[: content.index(_MARK, len(_MARK)) + len(_MARK)] if content.startswith(_MARK) else ""
    atomic_write_text(staged / CARD, f"{front}\n{text}" if front else text)
