"""Text encoders of a checkpoint in full precision again, as transformers saves them."""

from __future__ import annotations

from pathlib import Path

import torch

from s2q.checkpoint import S2QConfig
from s2q.checkpoint.load_components import load_model
from s2q.checkpoint.manifest import intact
from s2q.checkpoint.save import clean_config
from s2q.common.components import encoder_state
from s2q.exports.folder import read_tensors
from s2q.exports.verify import check_read
from s2q.models import ModelSource


def write_dequantized(
    source: ModelSource, folder: Path, staged: Path, component: str, config: S2QConfig, *, max_shard_size: int
) -> None:
    """Write a text encoder of a checkpoint's folder with full-precision linears, and compare what was written."""
    import transformers

    _, class_name = source.component_classes[component]
    with intact():
        model = load_model(
            folder / component,
            getattr(transformers, class_name),
            "transformers",
            dtype=getattr(torch, config.compute_dtype),
            variant=source.variant,
        )
    model = model.dequantize(dtype=model.dtype)
    model.save_pretrained(staged / component, max_shard_size=max_shard_size)
    clean_config(staged / component / "config.json")
    read = read_tensors(staged / component, library="transformers")
    check_read(read, encoder_state(model), component=component, done="exported")
