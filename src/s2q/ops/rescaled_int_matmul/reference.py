"""Rescaled integer product, the specification.

    y = (codes_x · codes_wᵀ) · Δ_w · Δ_x + b + c · Lᵀ + s        int32 inside, then fp32, then rounded once to the dtype

c · Lᵀ is what a low-rank branch beside the integers contributes, s what several tokens share: the product of the mean
of their cube (`core.cubes`).

Example: codes_x = [[2, 3]], Δ_x = [[0.5]], codes_w = [[4, -1]], Δ_w = [0.25], b = [1]: the sum is 5, y = [[1.625]].

Shapes: `M` tokens, `K` in features, `O` out features, `G` groups, `r` rank, `C` cubes, `P` packed bytes of a row
(`core.packing`).
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
    low_rank_input: Tensor | None = None,
    low_rank_weight: Tensor | None = None,
    shared_output: Tensor | None = None,
    shared_rows: Tensor | None = None,
    x_bits: int = 8,
    w_bits: int = 8,
    out_dtype: torch.dtype,
) -> Tensor:
    """Multiply codes and rescale the sums.

    Args:
        x_codes: int8 [M, K], within x_bits.
        x_scale: fp32 [M, 1], one per token.
        w_codes: int8 [O, K], within w_bits; or uint8 [O, P], the same packed.
        w_scale: fp32 [O], one per output channel, or [O, G], one per group of in features.
        bias: [O], floating, added in fp32.
        low_rank_input: c, fp32 [M, r], or None.
        low_rank_weight: L, [O, r], floating; there is one where there is the other.
        shared_output: S, fp32 [C, O], or None.
        shared_rows: int32 [M], the row of S that is added to each token; there is one where there is the other.
        x_bits: Width of the codes of x, at most 8; a promise that backends may use to be faster.
        w_bits: Width of the codes of w, at most 8; likewise, and it decides how uint8 codes are packed.
        out_dtype: Of the result [M, O]. The integer sums are exact (K ≤ 131071 at 8 bits each).

    Raises:
        InvalidInputError: If packed codes do not have the width that K codes take.
    """
    if w_codes.dtype == torch.uint8:
        w_codes = unpack_codes(w_codes, num_bits=w_bits, in_features=x_codes.shape[1])
    if w_scale.ndim == 1:
        total = int_matmul(x_codes, w_codes, x_bits=x_bits, w_bits=w_bits).float().mul_(w_scale)
    else:
        total = _grouped(x_codes, w_codes, w_scale, x_bits=x_bits, w_bits=w_bits)
    # One rounding for the product with Δ_x and the sum with b: fewer passes, and the same bits however rows are cut.
    total = total.mul_(x_scale) if bias is None else torch.addcmul(bias.float(), total, x_scale, out=total)
    if low_rank_input is not None and low_rank_weight is not None:
        total.addmm_(low_rank_input, low_rank_weight.float().t())
    if shared_output is not None and shared_rows is not None:
        total += shared_output.index_select(0, shared_rows)
    return total.to(out_dtype)


def _grouped(x_codes: Tensor, w_codes: Tensor, w_scale: Tensor, *, x_bits: int, w_bits: int) -> Tensor:
    """The sums of each group of in features times its scales, added up in fp32, [M, O]."""
    size = x_codes.shape[1] // w_scale.shape[1]
    parts = zip(torch.split(x_codes, size, 1), torch.split(w_codes, size, 1), w_scale.unbind(1), strict=True)
    total = torch.zeros(len(x_codes), len(w_codes), dtype=torch.float32, device=x_codes.device)
    for x_part, w_part, part_scale in parts:
        total.addcmul_(int_matmul(x_part, w_part, x_bits=x_bits, w_bits=w_bits).float(), part_scale)
    return total
