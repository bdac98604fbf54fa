"""Load any model, full precision or quantized, by name, folder or Hub id; quantized ones are checked first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from s2q import checkpoint
from s2q.core.components import transformers_of
from s2q.core.devices import check_device, default_dtype
from s2q.models import ModelSource, resolve_model
from s2q.models.source import parse_dtype
from s2q.nn import set_backend
from s2q.nn.runtime import check_backend

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def load_pipeline(
    model: str | Path | ModelSource,
    *,
    dtype: torch.dtype | str | None = None,
    device: str = "cpu",
    verify: bool = True,
    backend: str = "auto",
    attention_backend: str | None = None,
) -> DiffusionPipeline:
    """Load a pipeline.

    Args:
        model: Embedded name, pipeline folder or s2q checkpoint, Hub id, or a resolved source.
        dtype: Compute dtype or its name; None takes the one that the transformers are stored in or were quantized in,
            and float32 where that is one that the CPU emulates (`core.devices.default_dtype`).
        device: Where to put the pipeline.
        verify: Whether to compare the files of an s2q checkpoint with its manifest first.
        backend: How its packed linears are computed: "auto", "reference", "cpu", "triton" or "fastest"; see
            `s2q.nn.set_backend`.
        attention_backend: What computes attention, as diffusers names it ("native", "flash", "sage" and so on); None
            leaves PyTorch's own. `set_attention_backend` of a transformer changes it later.

    Returns:
        The pipeline, its progress bar switched off.

    Raises:
        InvalidInputError: If the model is unknown, damaged or altered, or the device, dtype or a backend is unknown.
        ResourceError: If there is no such device, or what the attention backend needs is not installed.
    """
    from s2q.models.attention import check_attention_backend, use_attention_registry

    check_device(device)
    check_backend(backend)
    if attention_backend is not None:
        check_attention_backend(attention_backend)
    source = model if isinstance(model, ModelSource) else resolve_model(model)
    if _is_ours(source):
        folder = source.complete_folder()
        config, *_ = checkpoint.read_configs(folder).values()
        wanted = parse_dtype(dtype) or default_dtype(getattr(torch, config.compute_dtype), device)
        pipe = checkpoint.load_pipeline(folder, dtype=wanted, device=device, verify=verify)
    else:
        wanted = parse_dtype(dtype) or default_dtype(source.stored_dtype(), device)
        pipe = source.load_pipeline(dtype=wanted, device=device)
    for transformer in transformers_of(pipe).values():
        set_backend(transformer, backend)
        use_attention_registry(transformer)
        if attention_backend is not None:
            transformer.set_attention_backend(attention_backend)
    return pipe


def check_model(model: str | Path | ModelSource) -> None:
    """Check what can be checked of a model without loading it, so that no work is done before it is refused.

    Args:
        model: Embedded name, pipeline folder or s2q checkpoint, Hub id, or a resolved source.

    Raises:
        InvalidInputError: If the model is unknown, or is an s2q checkpoint that is damaged or altered.
    """
    source = model if isinstance(model, ModelSource) else resolve_model(model)
    if _is_ours(source):
        folder = source.complete_folder()
        checkpoint.read_configs(folder)
        checkpoint.check_intact(folder)


def _is_ours(source: ModelSource) -> bool:
    return (source.quantization or {}).get("quant_method") == checkpoint.QUANT_METHOD
