"""Loaded pipelines: the two that are compared stay loaded until others are chosen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from s2q.common.arguments import parse_dtype
from s2q.common.components import transformers_of
from s2q.common.devices import free_memory
from s2q.common.progress import Progress
from s2q.generation.load import load_pipeline, own_dtype
from s2q.models import ModelSource, resolve_model
from s2q.run.quantize import quantize
from s2q.ui.offers import Offer

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Pipelines:
    """Loads offers, two at most at a time.

    Args:
        folder: Where checkpoints are written that a recipe makes of an embedded model.
        device: Where both pipelines are; each may take half of a GPU before it is offloaded.
        dtype: Compute dtype by name; None takes that of the left model.
        offload: As of `s2q.load`.
        backend: As of `s2q.load`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        device: str = "cpu",
        dtype: str | None = None,
        offload: str = "auto",
        backend: str = "auto",
    ) -> None:
        self.folder, self.device, self.dtype = folder, device, dtype
        self.offload, self.backend = offload, backend
        self._loaded: dict[tuple[str, torch.dtype], DiffusionPipeline] = {}

    def open(self, left: Offer, right: Offer, *, progress: Progress) -> tuple[DiffusionPipeline, DiffusionPipeline]:
        """Return two pipelines, loaded in the same dtype; those that do not fit are released first."""
        dtype = parse_dtype(self.dtype) or own_dtype(self.source(left, progress=progress), self.device)
        wanted = [(offer.label, dtype) for offer in (left, right)]
        for key in [key for key in self._loaded if key not in wanted]:
            del self._loaded[key]
        free_memory()
        return self._open(left, dtype=dtype, progress=progress), self._open(right, dtype=dtype, progress=progress)

    def source(self, offer: Offer, *, progress: Progress) -> ModelSource:
        """Return the model of an offer, quantized first if it has a recipe and this is its first use."""
        if offer.recipe is None:
            return offer.source
        folder = self.folder / f"{offer.source.name}-{offer.recipe}"
        if not folder.is_dir():
            quantize(offer.source, recipe=offer.recipe, out=folder, device=self.device, progress=progress)
        return resolve_model(folder)

    def _open(self, offer: Offer, *, dtype: torch.dtype, progress: Progress) -> DiffusionPipeline:
        key = offer.label, dtype
        if key not in self._loaded:
            source = self.source(offer, progress=progress)
            progress(f"loading {offer.label}", 0, 1)
            self._loaded[key] = load_pipeline(
                source, dtype=dtype, device=self.device, offload=self.offload, backend=self.backend, sharing=2
            )
            progress(f"loading {offer.label}", 1, 1)
        return self._loaded[key]


def weight_bytes(pipe: DiffusionPipeline) -> int:
    """Return the bytes of the weights of a pipeline's transformers in memory, buffers included."""
    modules = transformers_of(pipe).values()
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())
