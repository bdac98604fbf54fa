"""Weights that linears keep from call to call: dequantized where full precision is faster, prepacked where small."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from s2q.nn.codes import PackedCodes
from s2q.nn.stored import StoredLinear
from s2q.ops.int_matmul import cpu

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
    x_bits = 8 if layer.scheme.activation is None else layer.scheme.activation.num_bits
    return layer.simulated or narrow or not cpu.is_fast(x_bits=x_bits, w_bits=layer.scheme.weight.num_bits)


def integer_backend(layer: StoredLinear) -> str:
    """Return the backend of a layer's integer operations, which know nothing of "fastest"."""
    return "auto" if layer.backend == FASTEST else layer.backend


def keeps_prepacked(layer: StoredLinear) -> bool:
    """Tell whether a layer whose input is quantized keeps its codes prepacked (`DequantizedCache.prepacked`)."""
    weight, activation = layer.scheme.weight, layer.scheme.activation
    if layer.in_features * layer.out_features > PREPACKED_CODES or torch.compiler.is_compiling():
        return False
    on_cpu = layer.weight_scale.device.type == "cpu" and integer_backend(layer) in ("auto", "cpu")
    if not on_cpu or layer.weight_scale.ndim != 1 or activation is None:
        return False
    return cpu.multiplies_pairs(x_bits=activation.num_bits, w_bits=weight.num_bits)


class DequantizedCache:
    """Other forms of a layer's weight; copies of a layer begin without them."""

    def __init__(self) -> None:
        self._kept: tuple[Tensor, Tensor | None] | None = None
        self._kept_of: list[Tensor] = []
        self._kept_at: list[tuple[int, int, int]] = []
        self._prepacked: tuple[Tensor, int, Tensor] | None = None

    def of(self, layer: StoredLinear, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Return weight [O, I] and bias [O] or None; computed again for another dtype or once a tensor changed."""
        kept = self._kept
        tensors = [layer.packed_weight, *_plain_parameters(layer)]
        states = self._kept_at if torch.compiler.is_compiling() else [_state(tensor) for tensor in tensors]
        if kept is None or kept[0].dtype != dtype or self._kept_at != states:
            with _outside_inference_mode():
                kept = layer.effective_weight(dtype), layer.effective_bias(dtype)
            self._kept, self._kept_of, self._kept_at = kept, tensors, states
        return kept

    def prepacked(self, layer: StoredLinear) -> Tensor:
        """Return the codes [I, O] as oneDNN reads them; prepacked again after the packed ones change.

        Args:
            layer: Always the same one; it `keeps_prepacked`.
        """
        weight, kept = layer.packed_weight, self._prepacked
        version = _version(weight)
        if kept is None or kept[0] is not weight or kept[1] != version:
            with _outside_inference_mode():
                kept = self._prepacked = weight, version, cpu.prepack(layer.codes())
        return kept[2]

    @property
    def num_bytes(self) -> int:
        """Bytes that are kept."""
        prepacked = 0 if self._prepacked is None else self._prepacked[2].numel()
        return prepacked + sum(tensor.nbytes for tensor in self._kept or () if tensor is not None)

    def release(self) -> None:
        """Drop all of them: the layer has changed, or memory is needed."""
        self._kept, self._prepacked, self._kept_of, self._kept_at = None, None, [], []

    def __getstate__(self) -> dict[str, object]:
        """Copies of a layer keep nothing."""
        return vars(DequantizedCache())


def _plain_parameters(layer: StoredLinear) -> list[Tensor]:
    return [tensor for tensor in layer._parameters.values() if tensor is not None and type(tensor) is not PackedCodes]


def _state(tensor: Tensor) -> tuple[int, int, int]:
    """Equal as long as a tensor that is alive has not changed."""
    return id(tensor), tensor.data_ptr(), _version(tensor)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # inference tensors do not count their changes


def _outside_inference_mode() -> AbstractContextManager[object]:
    """Leave inference mode, whose tensors cannot be used outside of it; compilers cannot ask for the mode."""
    inferring = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    return torch.inference_mode(False) if inferring else nullcontext()
