"""Text encoders of a checkpoint in full precision again, as transformers saves them."""

from __future__ import annotations

from pathlib import Path

import torch

from s2q.checkpoint import S2QConfig
from s2q.checkpoint.manifest import intact
from s2q.checkpoint.save import clean_config
from s2q.common.errors import S2QError
from s2q.common.weight_files import weight_files
from s2q.models import ModelSource


def write_dequantized(
    source: ModelSource, folder: Path, staged: Path, component: str, config: S2QConfig, *, max_shard_size: int
) -> None:
    """Write a text encoder of a checkpoint's folder with full-precision linears, and compare what was written."""
    import transformers
    from safetensors.torch import load_file

    _, class_name = source.component_classes[component]
    with intact():
        model = getattr(transformers, class_name).from_pretrained(
            folder / component,
            dtype=getattr(torch, config.compute_dtype),
            variant=source.variant,
            use_safetensors=True,
        )
    model = model.dequantize(dtype=model.dtype)
    model.save_pretrained(staged / component, max_shard_size=max_shard_size)
    clean_config(staged / component / "config.json")
    written = model.state_dict()
    for path in weight_files(staged / component, library="transformers"):
        for name, tensor in load_file(path).items():
            if not torch.equal(tensor, written[name]):
                raise S2QError(f"{component}: {name} was read back otherwise; nothing was exported")
