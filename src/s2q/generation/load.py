"""Load any model, full precision or quantized, by name, folder or Hub id; quantized ones are checked first."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from s2q import checkpoint
from s2q.checkpoint import CheckpointReport
from s2q.common.arguments import (
    device_name,
    flag,
    model_argument,
    offload_name,
    optional,
    parse_dtype,
    path_argument,
    word,
)
from s2q.common.components import TRANSFORMERS, text_encoders_of, transformers_of
from s2q.common.devices import default_dtype, device_memory_bytes
from s2q.common.errors import InvalidInputError, UsageError, memory_errors
from s2q.common.loading_errors import LESS_MEMORY
from s2q.common.torch_state import in_fresh_torch_state
from s2q.generation.offload import fitting_offload, offload_pipeline
from s2q.models import ModelSource, resolve_model
from s2q.models.lora import effect_of
from s2q.nn import set_backend
from s2q.nn.runtime import check_backend
from s2q.ops.dispatch import FP4

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)


@memory_errors("loading a model", remedy=LESS_MEMORY)
@in_fresh_torch_state
def load_pipeline(
    model: str | Path | ModelSource,
    *,
    dtype: torch.dtype | str | None = None,
    variant: str | None = None,
    device: str | torch.device | int = "cpu",
    verify: bool | None = None,
    backend: str = "auto",
    attention_backend: str | None = None,
    offload: str = "auto",
    sharing: int = 1,
) -> DiffusionPipeline:
    """Load a pipeline.

    Args:
        model: Embedded name, pipeline folder or s2q checkpoint, Hub id ("organisation/name" or
            "organisation/name@revision"), or a resolved source.
        dtype: Compute dtype or its name; None takes the one that the transformers are stored in or were quantized in,
            and float32 where that is one that the CPU emulates (`common.devices.default_dtype`).
        variant: Variant of the weights, "fp16", as diffusers has it.
        device: Where to put the pipeline: "cpu", "cuda", "cuda:1", a `torch.device`, the index of a GPU.
        verify: Whether to compare the files of an s2q checkpoint with its manifest first: None does where there is a
            manifest and warns where there is none, True refuses a checkpoint without, False does not.
        backend: How its packed linears are computed: "auto", "reference", "cpu", "triton", "fastest" or "fp4";
            see `s2q.nn.set_backend`.
        attention_backend: What computes attention, as diffusers names it ("native", "flash", "sage" and so on); None
            leaves PyTorch's own. `set_attention_backend` of a transformer changes it later.
        offload: What a GPU has of the pipeline: "none" all, "model" one component at a time, "group" one block of a
            transformer or text encoder at a time, "auto" the first that leaves 30 % of its memory free.
        sharing: Processes that load it on the same GPU; "auto" divides the memory among them.

    Returns:
        The pipeline, its progress bar switched off.

    Raises:
        InvalidInputError: If the model is unknown, damaged or altered, or the device, dtype or a backend is unknown.
        ResourceError: If there is no such device, or what a component or the attention backend needs is not installed.
    """
    from s2q.models.attention import check_attention_backend, use_attention_registry

    model, device, dtype = model_argument("model", model), device_name(device), parse_dtype(dtype)
    check_backend(backend)
    way = offload_name(offload, device=device)
    where = device if way == "none" else "cpu"
    variant, verify = optional(word, "variant", variant), optional(flag, "verify", verify)
    if attention_backend is not None:
        check_attention_backend(attention_backend)
    source = resolve_model(model, variant=variant)
    if is_checkpoint(source):
        source.check_packages()
        folder = source.complete_folder()
        wanted = dtype or own_dtype(source, device, folder=folder)
        pipe = checkpoint.load_pipeline(folder, dtype=wanted, variant=source.variant, device=where, verify=verify)
    else:
        _check_leftover_manifest(source.folder, verify=verify)
        wanted = dtype or own_dtype(source, device)
        pipe = source.load_pipeline(dtype=wanted, device=where)
    way = fitting_offload(pipe, device, sharing=sharing) if way == "auto" else way
    if way == "none":
        pipe = pipe.to(device)
    else:
        logger.info("%s: offload by %s, on %s", source.name, way, device)
        offload_pipeline(pipe, device, offload=way)
    for encoder in text_encoders_of(pipe).values():  # their inputs are not quantized, so no product of them is in fp4
        set_backend(encoder, "auto" if backend == FP4 else backend)
    for transformer in transformers_of(pipe).values():
        set_backend(transformer, backend)
        use_attention_registry(transformer)
        if attention_backend is not None:
            transformer.set_attention_backend(attention_backend)
    return pipe


def own_dtype(source: ModelSource, device: str, *, folder: Path | None = None) -> torch.dtype:
    """Return the compute dtype of a model that is loaded without one; `folder` has the files of a checkpoint."""
    if not is_checkpoint(source):
        return default_dtype(source.stored_dtype(), device)
    config, *_ = checkpoint.read_configs(folder or source.folder).values()
    return default_dtype(getattr(torch, config.compute_dtype), device)


def pipeline_to_ask(source: ModelSource) -> DiffusionPipeline:
    """Return a pipeline that knows its sizes and its text: without weights, or loaded where it cannot be without."""
    return source.meta_pipeline(source.meta_transformers()) or load_pipeline(source)


def refuse_load_options(
    verb: str,
    *,
    dtype: Any = None,
    variant: str | None = None,
    verify: bool | None = None,
    backend: str = "auto",
    attention_backend: str | None = None,
    loras: Sequence[str | Path] = (),
    offload: str = "auto",
) -> None:
    """Refuse options of loading, other than their defaults, where every model is a loaded pipeline."""
    given = {
        "dtype": dtype is not None,
        "variant": variant is not None,
        "verify": verify is not None,
        "backend": backend != "auto",
        "attention_backend": attention_backend is not None,
        "loras": bool(loras),
        "offload": offload != "auto",
    }
    for name in (name for name, is_given in given.items() if is_given):
        raise UsageError(f"{verb}: {name} is for models by name or folder; load the pipeline with it (s2q.load)")


def check_model(model: str | Path | ModelSource, *, verify: bool | None = None) -> None:
    """Check what can be checked of a model without loading it, so that no work is done before it is refused."""
    source = resolve_model(model)
    source.check_packages()
    if is_checkpoint(source):
        folder = source.complete_folder()
        checkpoint.read_configs(folder)
        checkpoint.check_intact(folder, verify=verify)
    else:
        _check_leftover_manifest(source.folder, verify=verify)


def check_same_loras(model: ModelSource, reference: ModelSource) -> None:
    """Refuse a checkpoint that was made with other adapters than its reference is loaded with."""
    if not is_checkpoint(model):
        return
    fused, expected = checkpoint.fused_loras(model.complete_folder()), [lora.to_dict() for lora in reference.loras]
    if effect_of(fused) != effect_of(expected):
        described = [" and ".join(_described(lora) for lora in loras) or "none" for loras in (fused, expected)]
        raise InvalidInputError(
            f"{model.given}: was quantized with LoRA {described[0]}, the reference {reference.given} is loaded with "
            f"{described[1]}; pass the same with --lora"
        )


def _described(lora: Mapping[str, Any]) -> str:
    second = "" if lora["component"] == TRANSFORMERS[0] else f" in {lora['component']}"
    return f"{lora['file']} (SHA-256 {lora['sha256'][:8]}) at scale {lora['scale']:g}{second}"


def inspect_model(model: str | Path, *, variant: str | None = None, verify: bool = False) -> CheckpointReport:
    """Look into a checkpoint without loading it.

    Args:
        model: The checkpoint's folder, or its Hub id, "organisation/name" or "organisation/name@revision".
        variant: Variant of the weights, for a checkpoint that diffusers has saved again with one.
        verify: Whether to hash every file and compare with the manifest.

    Returns:
        Layers, bytes, files and what differs from the manifest.

    Raises:
        InvalidInputError: If there is no such checkpoint, it is not of s2q, or it is damaged.
    """
    path = path_argument("model", model)
    variant, verify = optional(word, "variant", variant), flag("verify", verify)
    if not path.is_dir():  # a folder is looked into even if it is damaged
        path = resolve_model(model, variant=variant).complete_folder()
    return checkpoint.inspect_checkpoint(path, variant=variant, verify=verify)


def is_checkpoint(source: ModelSource) -> bool:
    """Tell whether a model is a checkpoint of s2q."""
    return (source.quantization or {}).get("quant_method") == checkpoint.QUANT_METHOD


def require_checkpoint(source: ModelSource) -> None:
    """Refuse a model that is not a checkpoint of s2q."""
    if not is_checkpoint(source):
        raise InvalidInputError(f"{source.given} is not an s2q checkpoint; quantize the model first, with s2q quantize")


def models_that_fit(sources: Sequence[ModelSource], device: str) -> int | None:
    """Return how many times the weights of models fit into half of a device's memory; None if that is not known."""
    memory, weights = device_memory_bytes(device), sum(source.weight_bytes() for source in sources)
    return None if memory is None or not weights else memory // (2 * weights)


def _check_leftover_manifest(folder: Path, *, verify: bool | None) -> None:
    """Check a folder that is no checkpoint, but has a manifest: its configuration may have been altered."""
    if (folder / checkpoint.MANIFEST).exists():
        checkpoint.check_intact(folder, verify=verify)
