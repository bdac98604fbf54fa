"""Rescaled integer product, the specification.

    y = (codes_x · codes_wᵀ) · Δ_w · Δ_x + b + addend        int32 inside, then fp32, then rounded once to the dtype

Example: codes_x = [[2, 3]], Δ_x = [[0.5]], codes_w = [[4, -1]], Δ_w = [0.25], b = [1]: the sum is 5, y = [[1.625]].

Shapes: `M` tokens, `K` in features, `O` out features, `P` packed bytes of a row (`core.packing`).
"""

import torch
from torch import Tensor

from s2q.core.packing import unpack_codes
from s2q.ops.int_matmul import int_matmul


def rescaled_int_matmul(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    *,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    x_bits: int = 8,
    w_bits: int = 8,
    out_dtype: torch.dtype,
) -> Tensor:
    """Multiply codes and rescale the sums.

    Args:
        x_codes: int8 [M, K], within x_bits.
        x_scale: fp32 [M, 1], one per token.
        w_codes: int8 [O, K], within w_bits; or uint8 [O, P], the same packed.
        w_scale: fp32 [O], one per output channel.
        bias: [O], floating, added in fp32.
        addend: fp32 [M, O], added last: what a branch beside the integers contributes.
        x_bits: Width of the codes of x, at most 8; a promise that backends may use to be faster.
        w_bits: Width of the codes of w, at most 8; likewise, and it decides how uint8 codes are packed.
        out_dtype: Floating, of the result.

    Returns:
        [M, O] in out_dtype. The integer sums are exact (K ≤ 131071 at 8 bits each).

    Raises:
        InvalidInputError: If packed codes do not have the width that K codes take.
    """
    if w_codes.dtype == torch.uint8:
        w_codes = unpack_codes(w_codes, num_bits=w_bits, in_features=x_codes.shape[1])
    sums = int_matmul(x_codes, w_codes, x_bits=x_bits, w_bits=w_bits)
    total = sums.float().mul_(w_scale).mul_(x_scale)
    if bias is not None:
        total.add_(bias)
    if addend is not None:
        total.add_(addend)
    return total.to(out_dtype)
