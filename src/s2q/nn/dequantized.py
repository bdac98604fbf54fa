"""Linears that run faster in full precision than on integers; what their codes stand for is kept from call to call."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from s2q.ops.int_matmul import cpu

if TYPE_CHECKING:
    from s2q.nn.packed import PackedLinear

FASTEST = "fastest"
"""The backend that leaves integers where they are slower."""

NARROW = 1024
"""Features in or out below which a CPU is faster in full precision (docs/speed.md)."""


def runs_dequantized(layer: PackedLinear) -> bool:
    """Tell whether a layer runs as a full-precision linear: its input is not quantized, its weight kept dequantized.

    With the backend "fastest" alone, where integers would be slower: on a CPU below `NARROW` features in or out or
    without instructions for int8, and where no kernel takes the scheme.

    Args:
        layer: The layer.
    """
    if layer.backend != FASTEST:
        return False
    if layer.weight_scale.device.type != "cpu":
        return layer.scheme.simulated
    narrow = min(layer.in_features, layer.out_features) < NARROW
    return layer.scheme.simulated or narrow or not cpu.IS_AVAILABLE


def integer_backend(layer: PackedLinear) -> str:
    """Return the backend of a layer's integer operations, which know nothing of "fastest".

    Args:
        layer: The layer.
    """
    return "auto" if layer.backend == FASTEST else layer.backend


class KeptDequantized:
    """What the codes of a layer stand for, as a full-precision linear has it."""

    def __init__(self) -> None:
        self._kept: tuple[Tensor, Tensor | None] | None = None

    def of(self, layer: PackedLinear, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Return weight [O, I] and bias [O] or None; made anew if the dtype or the device is another than last time.

        Args:
            layer: Always the same one.
            dtype: Floating.
        """
        kept = self._kept
        if kept is None or kept[0].dtype != dtype or kept[0].device != layer.weight_scale.device:
            # What is made in inference mode could not be used outside of it; compilers cannot ask for the mode.
            inferring = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
            with torch.inference_mode(False) if inferring else nullcontext():
                kept = self._kept = layer.effective_weight(dtype), layer.effective_bias(dtype)
        return kept

    @property
    def num_bytes(self) -> int:
        """Bytes that are kept."""
        return sum(tensor.nbytes for tensor in self._kept or () if tensor is not None)

    def release(self) -> None:
        """Let go of it, because the layer has changed or for the memory."""
        self._kept = None
