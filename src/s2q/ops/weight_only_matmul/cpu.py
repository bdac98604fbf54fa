"""Product of few rows with a packed weight on the CPU: unpacked in pieces that stay in the caches.

The even and the odd in features are in the low and in the high nibbles; each half is multiplied by itself, so that
nothing has to be interleaved. The scales are applied to the sums, in fp32.

Shapes: `M` rows, `K` in features, `O` out features, `P` packed bytes of a row (`core.packing`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from s2q.core.packing import packed_width
from s2q.ops.weight_only_matmul import reference

PIECE = 1 << 19
"""Codes that are unpacked at a time."""


def weight_only_matmul(
    x: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    *,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    w_bits: int = 8,
) -> Tensor:
    """Multiply rows with the weight that codes stand for; see `reference.weight_only_matmul`.

    Args:
        x: [M, K], floating.
        w_codes: int8 [O, K], or uint8 [O, P].
        w_scale: fp32 [O]; [O, G], and more than `FEW_ROWS` rows, are left to the reference.
        bias: [O], floating, or None.
        addend: fp32 [M, O], or None.
        w_bits: Width of the codes.

    Returns:
        [M, O] in the dtype of x.
    """
    rows, depth = x.shape
    is_packed = w_codes.dtype == torch.uint8 and w_bits <= 4
    fits = w_codes.shape[1] == (packed_width(w_bits, depth) if is_packed else depth)
    if rows > reference.FEW_ROWS or w_scale.ndim != 1 or x.dtype == torch.float64 or not fits:
        return reference.weight_only_matmul(x, w_codes, w_scale, bias=bias, addend=addend, w_bits=w_bits)
    wide = x.float()
    halves = _halves(wide) if is_packed else (wide,)
    columns = len(w_codes)
    out = torch.empty(rows, columns, dtype=x.dtype)
    step = max(1, PIECE // max(1, depth))
    for start in range(0, columns, step):
        part = slice(start, start + step)
        total = sum(map(F.linear, halves, _unpacked(w_codes[part], is_packed=is_packed))) * w_scale[part]
        if bias is not None:
            total += bias[part]
        if addend is not None:
            total += addend[:, part]
        out[:, part] = total
    return out


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """The even and the odd features; a missing last odd one is 0."""
    odd = x[:, 1::2]
    if x.shape[1] % 2:
        odd = F.pad(odd, (0, 1))
    return x[:, 0::2].contiguous(), odd.contiguous()


def _unpacked(codes: Tensor, *, is_packed: bool) -> tuple[Tensor, ...]:
    """Codes in fp32, those of the even and those of the odd features apart where they are packed."""
    if not is_packed:
        return (codes.view(torch.int8).float(),)
    return (codes & 15).float().sub_(8), (codes >> 4).float().sub_(8)
