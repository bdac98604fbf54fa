"""Weights that linears keep from call to call: dequantized where full precision is faster, prepacked where small."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from s2q.ops.dispatch import FP4
from s2q.ops.int_matmul import cpu

if TYPE_CHECKING:
    from s2q.nn.stored import StoredLinear

FASTEST = "fastest"
"""The backend that leaves integers where they are slower."""

NARROW = 1024
"""Features in or out below which a CPU is faster in full precision (docs/speed.md)."""

PREPACKED_CODES = 1 << 18
"""Codes of a weight up to which it is kept as a CPU without VNNI multiplies it, a byte each.

Unpacking and prepacking in the call take a fortieth of the product's time for 2048 rows, but a third for the 416 of the
embedded models. Those of published models are larger.
"""


def runs_dequantized(layer: StoredLinear) -> bool:
    """Tell whether a layer runs as a full-precision linear: its input is not quantized, its weight kept dequantized.

    With the backend "fastest" alone, where integers would be slower: on a CPU below `NARROW` features in or out or
    without instructions for codes of its widths, and where no kernel takes the scheme.
    """
    if layer.backend != FASTEST:
        return False
    if layer.weight_scale.device.type != "cpu":
        return layer.simulated
    narrow = min(layer.in_features, layer.out_features) < NARROW
    x_bits = 8 if layer.scheme.activation is None else layer.scheme.activation.widest
    return layer.simulated or narrow or not cpu.is_fast(x_bits=x_bits, w_bits=layer.scheme.weight.product_bits)


def integer_backend(layer: StoredLinear) -> str:
    """Return the backend of a layer's integer operations, which know nothing of "fastest" and "fp4"."""
    return "auto" if layer.backend in (FASTEST, FP4) else layer.backend


def keeps_prepacked(layer: StoredLinear) -> bool:
    """Tell whether a layer whose input is quantized keeps its codes prepacked (`WeightCache.prepacked`)."""
    activation = layer.scheme.activation
    if layer.in_features * layer.out_features > PREPACKED_CODES or torch.compiler.is_compiling():
        return False
    on_cpu = layer.weight_scale.device.type == "cpu" and integer_backend(layer) in ("auto", "cpu")
    if not on_cpu or layer.weight_scale.ndim != 1 or activation is None:
        return False
    return cpu.multiplies_pairs(x_bits=activation.widest, w_bits=layer.scheme.weight.product_bits)


class WeightCache:
    """Another form of a layer's weight: computed again once a tensor that it comes from has changed; copies are empty.

    It is dropped as soon as one of those tensors is gone: moving a layer, by whatever means, replaces the tensor of its
    codes, so no memory is pinned where it has left. Threads may compute it twice; each gets that of its sources.
    """

    def __init__(self) -> None:
        self._kept: tuple[tuple[Any, ...], object, list[tuple[int, int, int]], list[weakref.ref[Tensor]]] | None = None

    def dequantized(self, layer: StoredLinear, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Return weight [O, I] and bias [O] or None, in a dtype."""
        others = [tensor for name, tensor in layer._parameters.items() if tensor is not None and name != "weight"]
        weight, bias = self._get(dtype, [layer.packed_weight, *others], lambda: layer.effective_parameters(dtype))
        return weight, bias

    def prepacked(self, layer: StoredLinear) -> Tensor:
        """Return the codes [I, O] of a layer that `keeps_prepacked`, or their values, as oneDNN reads them."""
        scale, by_level = layer.weight_group_scale, layer.scheme.weight.has_int8_levels
        sources = [layer.packed_weight, *([] if scale is None else [scale])]
        multiplied = layer.product_codes if by_level else layer.codes
        (codes,) = self._get("prepacked", sources, lambda: (cpu.prepack(multiplied()),))
        return codes  # type: ignore[no-any-return]

    def form(self, layer: StoredLinear, key: str, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Return another form of a layer's codes and scales, which `compute` makes; `key` names it."""
        return self._get(key, [layer.packed_weight, layer.weight_scale], compute)

    @property
    def num_bytes(self) -> int:
        """Bytes that are kept."""
        kept = self._kept
        tensors = [tensor for tensor in (() if kept is None else kept[0]) if tensor is not None]
        return sum(tensor.numel() if tensor.is_mkldnn else tensor.nbytes for tensor in tensors)

    def _get(self, key: object, sources: list[Tensor], compute: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        """Return what `compute` returned for this key and these sources, unchanged since, or returns now."""
        kept = self._kept
        if torch.compiler.is_compiling():  # has no addresses, versions and weak references
            if kept is None or kept[1] != key:
                kept = self._kept = (compute(), key, [], [])
            return kept[0]
        states = _states(sources)
        if kept is None or kept[1:3] != (key, states):
            self._kept = None
            with torch.inference_mode(False):  # tensors of that mode cannot be used outside of it
                value = compute()
            kept = self._kept = (value, key, states, [weakref.ref(tensor, self.release) for tensor in sources])
        return kept[0]

    def release(self, _gone: object = None) -> None:
        """Drop it: the layer has changed, or memory is needed."""
        self._kept = None

    def __getstate__(self) -> dict[str, object]:
        return vars(WeightCache())


def _states(tensors: list[Tensor]) -> list[tuple[int, int, int]]:
    """Equal as long as tensors that are alive have not changed, or are those of inference mode."""
    try:
        return [(id(tensor), tensor.data_ptr(), tensor._version) for tensor in tensors]
    except RuntimeError:  # tensors of inference mode do not count their changes
        return [(id(tensor), tensor.data_ptr(), 0) for tensor in tensors]
