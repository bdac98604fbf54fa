"""Values of packed codes on the CPU: compiled (`ops.fused`), or two codes a look-up in pieces that stay in the caches.

The table of bytes has the levels of both nibbles, of 16 bits each where groups have scales: times 8, so that the upper
byte of 8 · l · s + 128 is ⌊(l · s + 16) / 32⌋.

Shapes: `O` out features, `K` in features, `G` groups, `P` packed bytes of a row (`core.packing`).
"""

import torch
from torch import Tensor

from s2q.core.codebook import table_and_scale
from s2q.core.packing import NIBBLES
from s2q.ops.fused import passes
from s2q.ops.level_values import reference
from s2q.ops.scratch import take

PIECE = 1 << 19
"""Codes that are looked up at a time."""

_BYTES = 256


def level_values(
    levels: Tensor, packed: Tensor, group_scale: Tensor | None = None, *, in_features: int, out: Tensor | None = None
) -> Tensor:
    """Look up the levels of packed codes; see `reference.level_values`, to which groups of an odd size are left.

    Args:
        out: int8 [O, K], contiguous, which may be written and returned in place of a new tensor.
    """
    rows, width = packed.shape
    whole_bytes = in_features == 2 * width and (group_scale is None or width % group_scale.shape[1] == 0)
    if not whole_bytes or not packed.numel():
        return reference.level_values(levels, packed, group_scale, in_features=in_features)
    fused = passes()
    if fused is not None and group_scale is not None:
        values = torch.empty(rows, in_features, dtype=torch.int8, device="cpu") if out is None else out
        fused.values(packed.contiguous(), levels.contiguous(), group_scale.contiguous(), out=values)
        return values
    table = _byte_table(levels, scaled=group_scale is not None)
    out = torch.empty(rows, in_features, dtype=torch.int8, device="cpu")
    step = max(1, PIECE // in_features)
    for start in range(0, rows, step):
        part = packed[start : start + step]
        index = take("level_values index", (part.numel(),), torch.int32).copy_(part.reshape(-1))
        if group_scale is None:
            torch.index_select(table, 0, index, out=out[start : start + step].view(table.dtype).view(-1))
            continue
        number, scale = table_and_scale(group_scale[start : start + step].unsqueeze(2))
        index.view(len(part), group_scale.shape[1], -1).add_(number.int() * _BYTES)
        wide = take("level_values wide", (part.numel(),), table.dtype)
        torch.index_select(table, 0, index, out=wide)
        products = wide.view(torch.int16).view(len(part), group_scale.shape[1], -1)
        products.mul_(scale.to(torch.int16)).add_(1 << 7)
        out[start : start + step] = wide.view(torch.int8).view(len(part), in_features, 2)[:, :, 1]  # little-endian
    return out


def _byte_table(levels: Tensor, *, scaled: bool) -> Tensor:
    """The levels of both nibbles of each byte, the low one first: int16 [256] of two int8.

    Scaled: int32 [1024] of two int16, the bytes of one table after those of the other.
    """
    byte = torch.arange(_BYTES, device="cpu")
    tables = levels.view(-1, NIBBLES)
    pairs = torch.stack([tables[:, byte & 15], tables[:, byte >> 4]], dim=2)
    if scaled:
        return (pairs.to(torch.int16) * 8).view(torch.int32).flatten()
    return pairs.view(torch.int16).flatten()
