"""Product of few rows with a packed weight on the CPU: unpacked in pieces that stay in the caches.

Shapes: `M` rows, `K` in features, `O` out features, `P` packed bytes of a row (`core.packing`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from s2q.core.packing import unpack_codes
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
    wide, columns = x.float(), len(w_codes)
    out = torch.empty(rows, columns, dtype=x.dtype, device="cpu")
    step = max(1, PIECE // max(1, depth))
    for start in range(0, columns, step):
        part = slice(start, start + step)
        codes = w_codes[part]
        if codes.dtype == torch.uint8:
            codes = unpack_codes(codes, num_bits=w_bits, in_features=depth)
        total = F.linear(wide, codes.float()).mul_(w_scale[part])
        if bias is not None:
            total.add_(bias[part])
        out[:, part] = total
    return out
