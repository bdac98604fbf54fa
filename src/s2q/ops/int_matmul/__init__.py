"""Exact product of two integer matrices; every backend gives the same bits."""

from collections.abc import Callable

from torch import Tensor

from s2q.common.errors import unknown_name
from s2q.common.torch_state import without_autocast
from s2q.ops.int_matmul import cpu, reference

BACKENDS: dict[str, Callable[..., Tensor]] = {"reference": reference.int_matmul, "cpu": cpu.int_matmul}

__all__ = ["BACKENDS", "int_matmul"]


@without_autocast
def int_matmul(x_codes: Tensor, w_codes: Tensor, *, x_bits: int = 8, w_bits: int = 8, backend: str = "auto") -> Tensor:
    """Multiply codes, y = x · wᵀ, bit-equal to the product in int64; see `reference.int_matmul`.

    The backend is "reference", "cpu", or "auto": the fastest that is exact on the device of x.

    Raises:
        InvalidInputError: If there is no such backend.
    """
    if backend == "auto":
        backend = "cpu" if x_codes.device.type == "cpu" else "reference"
    if backend not in BACKENDS:
        raise unknown_name("backend", backend, ("auto", *BACKENDS))
    return BACKENDS[backend](x_codes, w_codes, x_bits=x_bits, w_bits=w_bits)
