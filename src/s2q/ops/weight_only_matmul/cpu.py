"""Product of few rows with a packed weight on the CPU: unpacked in pieces that stay in the caches.

Shapes: `M` rows, `K` in features, `O` out features, `P` packed bytes of a row (`core.packing`).
"""

import torch
from torch import Tensor

from s2q.ops.weight_only_matmul import reference

PIECE = 1 << 19
"""Codes that are unpacked at a time."""


def weight_only_matmul(
    x: Tensor, w_codes: Tensor, w_scale: Tensor, *, bias: Tensor | None = None, w_bits: int = 8
) -> Tensor:
    """Multiply rows with the dequantized weight; see `reference.weight_only_matmul`.

    [O, G] scales, and more than `FEW_ROWS` rows, are left to the reference.
    """
    rows, depth = x.shape
    if rows > reference.FEW_ROWS or w_scale.ndim != 1 or x.dtype == torch.float64:
        return reference.weight_only_matmul(x, w_codes, w_scale, bias=bias, w_bits=w_bits)
    out = torch.empty(rows, len(w_codes), dtype=x.dtype, device="cpu")
    step = max(1, PIECE // max(1, depth))
    for start in range(0, len(w_codes), step):
        part = slice(start, start + step)
        bias_part = None if bias is None else bias[part]
        out[:, part] = reference.weight_only_matmul(x, w_codes[part], w_scale[part], bias=bias_part, w_bits=w_bits)
    return out
