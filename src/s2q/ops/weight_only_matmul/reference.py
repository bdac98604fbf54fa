"""Product with a packed integer weight, the specification.

    y = (x · codes_wᵀ) · Δ_w + b        in fp32, rounded once, for up to `FEW_ROWS` rows
    y = x · (codes_w · Δ_w)ᵀ + b        the weight rounded to the dtype of x, for more, and for groups

Codes are exact in any floating dtype, so that scaling the sums is the more exact, and is what kernels that unpack the
weight as they read it do. For many rows the products are what takes time, and those of half precision the faster.

Example: x = [[2, 1]], codes_w = [[4, -1]], Δ_w = [0.25], b = [1]: the weight is [[1, -0.25]], y = [[2.75]].

Shapes: `M` rows, `K` in features, `O` out features, `G` groups, `P` packed bytes of a row (`core.packing`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from s2q.core.packing import unpack_codes
from s2q.core.qparams import dequantize_weight

FEW_ROWS = 16
"""Up to so many rows, reading the weight is what takes time, and backends unpack it piece by piece as they read it."""


def weight_only_matmul(
    x: Tensor, w_codes: Tensor, w_scale: Tensor, *, bias: Tensor | None = None, w_bits: int = 8
) -> Tensor:
    """Multiply rows x [M, K] with the dequantized weight; [M, O] in the dtype of x, to which the bias is rounded.

    Args:
        w_codes: int8 [O, K], within w_bits; or uint8 [O, P], the same packed.
        w_scale: fp32 [O], one per output channel, or [O, G], one per group of in features.

    Raises:
        InvalidInputError: If packed codes do not have the width that K codes take.
    """
    if w_codes.dtype == torch.uint8:
        w_codes = unpack_codes(w_codes, num_bits=w_bits, in_features=x.shape[1])
    if len(x) <= FEW_ROWS and w_scale.ndim == 1 and x.dtype != torch.float64:
        total = F.linear(x.float(), w_codes.float()).mul_(w_scale)
        return (total if bias is None else total.add_(bias)).to(x.dtype)
    weight = dequantize_weight(w_codes, w_scale).to(x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
