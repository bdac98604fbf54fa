"""Write a checkpoint: a diffusers pipeline folder that appears at its place all at once, its manifest written last."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2q import pipelines
from s2q.checkpoint.config import S2QConfig
from s2q.checkpoint.manifest import owned_files, strange_files, write_manifest
from s2q.checkpoint.model_card import render_model_card
from s2q.common.cards import CARD
from s2q.common.components import transformers_of
from s2q.common.errors import InvalidInputError
from s2q.common.files import atomic_write_bytes, atomic_write_json, atomic_write_text
from s2q.common.outputs import OutputLock, staged_directory
from s2q.common.records import RECORDS, REPORT

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

EVENTS = RECORDS / "events.jsonl"
LICENCE = "LICENSE*"


@dataclass(frozen=True, kw_only=True)
class CheckpointRecords:
    """Records of the run that made a checkpoint.

    Attributes:
        source: Name of what was quantized: an embedded name, a Hub id, a folder's name.
        revision: Its commit, for a model on the Hub; else None.
        recipe: The resolved recipe, for s2q/recipe.json.
        report: The run's report, for s2q/report.json; `storage` and `metrics` are shown on the model card.
        events: The run's events in order, for s2q/events.jsonl.
        base_folder: Folder of the original, for its licence; None if there is none.
        files: Further files of s2q/ by name: selection.json, selection.png.
    """

    source: str
    recipe: Mapping[str, Any]
    report: Mapping[str, Any]
    events: Sequence[Mapping[str, Any]] = ()
    base_folder: Path | None = None
    revision: str | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)


def save_checkpoint(
    pipe: DiffusionPipeline,
    out: Path,
    *,
    records: CheckpointRecords,
    overwrite: bool = False,
    max_shard_size: int | str = "10GB",
    lock: OutputLock | None = None,
) -> None:
    """Write a pipeline with packed transformers (see `attach_config`) as a checkpoint; `out` appears complete.

    Args:
        overwrite: Whether to replace an existing s2q checkpoint that has no files of the user.
        max_shard_size: Size at which weight files are split, "5GB".
        lock: The lock of `out`, where the caller holds it.
    """
    stored = [part.config.get("quantization_config") for part in transformers_of(pipe).values()]
    configs = [config for config in stored if isinstance(config, S2QConfig)]
    if not configs:
        raise InvalidInputError("the pipeline's transformer is not quantized by s2q; quantize it first")
    with staged_directory(out, overwrite=overwrite, owned=owned_files, lock=lock) as staged:
        with _unused_tokenizers(pipe):
            pipe.save_pretrained(staged, max_shard_size=max_shard_size)
        for path in (pipelines.find_index(staged), *staged.glob("*/config.json")):
            clean_config(path)
        if records.base_folder is not None:
            copy_top_files(records.base_folder, staged, LICENCE)
            pipelines.copy_files(records.base_folder, staged, strange=strange_files)
        card = render_model_card(
            *configs,
            pipeline_class=pipelines.loading_class(type(pipe).__name__),
            source=records.source,
            revision=records.revision,
            recipe=records.recipe,
            report=records.report,
            base_folder=records.base_folder,
        )
        atomic_write_text(staged / CARD, card)
        (staged / RECORDS).mkdir()
        atomic_write_json(staged / RECORDS / "recipe.json", dict(records.recipe))
        atomic_write_json(staged / REPORT, dict(records.report))
        lines = [json.dumps(event, sort_keys=True, allow_nan=False) + "\n" for event in records.events]
        atomic_write_text(staged / EVENTS, "".join(lines))
        for name, content in records.files.items():
            atomic_write_bytes(staged / RECORDS / name, content)
        write_manifest(staged)


@contextlib.contextmanager
def _unused_tokenizers(pipe: DiffusionPipeline) -> Iterator[None]:
    """Take the last call's padding and truncation out of tokenizers; else a resumed run saves other bytes."""
    parts = (getattr(component, "backend_tokenizer", None) for component in pipe.components.values())
    used = [(tokenizer, tokenizer.padding, tokenizer.truncation) for tokenizer in parts if tokenizer is not None]
    for tokenizer, _, _ in used:
        tokenizer.no_padding()
        tokenizer.no_truncation()
    try:
        yield
    finally:
        for tokenizer, padding, truncation in used:
            if padding is not None:
                tokenizer.enable_padding(**padding)
            if truncation is not None:
                tokenizer.enable_truncation(**truncation)


def clean_config(path: Path) -> None:
    """Remove the local path from config.json, and name float32 as the dtype of a text encoder.

    Without `dtype=`, diffusers loads its own components in float32 and transformers those in their declared dtype;
    mixed dtypes fail at the first linear. The stored tensors do not change, and `dtype=` still decides.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    for key in ("dtype", "torch_dtype"):
        if key in config and "architectures" in config:
            config[key] = "float32"
    atomic_write_json(path, config)


def copy_top_files(source: Path, target: Path, *patterns: str) -> None:
    """Copy files at the top of a folder whose names match shell-style patterns."""
    for pattern in patterns:
        for path in sorted(path for path in source.glob(pattern) if path.is_file()):
            shutil.copyfile(path, target / path.name)
