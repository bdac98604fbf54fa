"""Product of floating-point rows with a packed integer weight: linears whose input is not quantized (adaLN, text)."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from s2q.ops.dispatch import choose_backend, opaque_op, triton_backend
from s2q.ops.weight_only_matmul import cpu, reference

BACKENDS: dict[str, Callable[..., Tensor]] = {
    "reference": reference.weight_only_matmul,
    "cpu": cpu.weight_only_matmul,
    "triton": triton_backend("weight_only_matmul"),
}

__all__ = ["BACKENDS", "weight_only_matmul"]


def _shape(x: Tensor, w_codes: Tensor, *_: Any, **_options: Any) -> Tensor:
    return x.new_empty(x.shape[0], w_codes.shape[0])


@opaque_op("weight_only_matmul", _shape)
def weight_only_matmul(
    x: Tensor, w_codes: Tensor, w_scale: Tensor, bias: Tensor | None = None, *, w_bits: int = 8, backend: str = "auto"
) -> Tensor:
    """Multiply rows with the dequantized weight; see `reference.weight_only_matmul`.

    The backend is "reference", "cpu", "triton", or "auto": Triton where it can run on a GPU, cpu on the CPU.

    Raises:
        InvalidInputError: If there is no such backend, or it cannot run here.
    """
    return choose_backend(backend, x, BACKENDS)(x, w_codes, w_scale, bias=bias, w_bits=w_bits)
