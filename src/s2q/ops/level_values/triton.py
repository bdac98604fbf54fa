"""Values of packed codes on a GPU: one read of codes and scales, one write of values.

The levels are read from the first-level cache. Products read the values as any int8 weight.

Shapes: `O` out features, `K` in features, `G` groups, `P` packed bytes of a row (`core.packing`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2q.core.packing import NIBBLE_BITS, check_packed
from s2q.ops.dispatch import launch

BLOCK = 1024
"""Bytes that a program looks up. UNTUNED."""


def level_values(levels: Tensor, packed: Tensor, group_scale: Tensor | None = None, *, in_features: int) -> Tensor:
    """Look up the levels of packed codes; see `reference.level_values`."""
    rows, width = packed.shape
    check_packed(packed, num_bits=NIBBLE_BITS, in_features=in_features)
    packed = packed if packed.stride(1) == 1 else packed.contiguous()
    values = torch.empty(rows, in_features, dtype=torch.int8, device=packed.device)
    if values.numel():
        launch(
            level_values_kernel,
            (rows, triton.cdiv(width, BLOCK)),
            packed,
            levels.contiguous(),
            levels if group_scale is None else group_scale.contiguous(),
            values,
            packed.stride(0),
            **value_constants(in_features, 0 if group_scale is None else group_scale.shape[1]),
            num_warps=4,
        )
    return values


def value_constants(in_features: int, groups: int) -> dict[str, int]:
    """Return the constants of `level_values_kernel`; 0 groups: without scales."""
    return {"DEPTH": in_features, "GROUPS": groups, "BLOCK": BLOCK}


@triton.jit
def level_values_kernel(
    packed_ptr,
    levels_ptr,
    group_scale_ptr,
    values_ptr,
    packed_stride,
    DEPTH: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Look up BLOCK bytes of one row."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    bytes_at = start + tl.arange(0, BLOCK)
    packed = tl.load(packed_ptr + row * packed_stride + bytes_at, mask=bytes_at < (DEPTH + 1) // 2, other=0)
    nibbles = tl.reshape(tl.join(packed & 15, packed >> 4), (2 * BLOCK,)).to(tl.int32)
    values_at = 2 * start + tl.arange(0, 2 * BLOCK)
    if GROUPS > 0:
        group = values_at // (DEPTH // GROUPS)
        byte = tl.load(group_scale_ptr + row * GROUPS + group, mask=values_at < DEPTH, other=0).to(tl.int32)
        levels = tl.load(levels_ptr + nibbles + 16 * (byte & 3)).to(tl.int32)
        values = ((levels * (byte >> 2) + 16) >> 5).to(tl.int8)
    else:
        values = tl.load(levels_ptr + nibbles)
    tl.store(values_ptr + row * DEPTH + values_at, values, mask=values_at < DEPTH)
