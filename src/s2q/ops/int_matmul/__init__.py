"""Exact product of two integer matrices: the same bits on every device."""

from torch import Tensor

from s2q.common.torch_state import without_autocast
from s2q.ops.int_matmul import cpu, reference

__all__ = ["int_matmul"]


@without_autocast
def int_matmul(x_codes: Tensor, w_codes: Tensor, *, x_bits: int = 8, w_bits: int = 8) -> Tensor:
    """Multiply codes, y = x · wᵀ, bit-equal to the product in int64; see `reference.int_matmul`."""
    run = cpu.int_matmul if x_codes.device.type == "cpu" else reference.int_matmul
    return run(x_codes, w_codes, x_bits=x_bits, w_bits=w_bits)
