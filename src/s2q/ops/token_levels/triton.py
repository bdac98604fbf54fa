"""Tokens in int8 levels on a GPU: one program a token, which reads it twice, for its scale and for its values.

The value is the first level and a step for each boundary that x / Δ is above; there are 15 of 4 bits at most. The sum
of squares has another order than the reference's, so a value near a boundary may be that of the level beside it.

Shapes: `M` tokens, `I` features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2q.ops.dispatch import launch

BLOCK = 1024
"""Features at a time. UNTUNED."""


def token_levels(x: Tensor, levels: Tensor, clip_ratio: Tensor | None = None, *, unit: float) -> tuple[Tensor, Tensor]:
    """Quantize each token to the nearest levels; see `reference.token_levels`."""
    rows, features = x.shape
    values = torch.empty(rows, features, dtype=torch.int8, device=x.device)
    scales = torch.zeros(rows, 1, dtype=torch.float32, device=x.device)
    if values.numel():
        x = x if x.stride(1) == 1 else x.contiguous()
        clip = (
            torch.ones(1, dtype=torch.float32, device=x.device)
            if clip_ratio is None
            else clip_ratio.float().reshape(-1).contiguous()
        )
        launch(
            token_levels_kernel,
            (rows,),
            x,
            ((levels[1:] + levels[:-1]) / 2).contiguous(),
            levels.contiguous(),
            clip,
            values,
            scales,
            x.stride(0),
            0 if len(clip) == 1 else 1,
            unit,
            **level_constants(features, len(levels)),
            num_warps=4,
        )
    return values, scales


def level_constants(features: int, levels: int) -> dict[str, int]:
    """Return the constants of `token_levels_kernel`."""
    return {"FEATURES": features, "LEVELS": levels, "BLOCK": BLOCK}


@triton.jit
def token_levels_kernel(
    x_ptr,
    bounds_ptr,
    levels_ptr,
    clip_ptr,
    values_ptr,
    token_scale_ptr,
    x_stride,
    clip_stride,
    unit,
    FEATURES: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantize one token, BLOCK features at a time."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, FEATURES, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < FEATURES, other=0.0).to(tl.float32)
        squares += x * x
    scale = tl.sqrt(tl.sum(squares, axis=0) / FEATURES) * unit * tl.load(clip_ptr + row * clip_stride)
    tl.store(token_scale_ptr + row, scale)
    over = tl.where(scale == 0.0, 1.0, scale)
    for start in range(0, FEATURES, BLOCK):
        at = start + tl.arange(0, BLOCK)
        ratio = tl.load(x_ptr + at, mask=at < FEATURES, other=0.0).to(tl.float32) / over
        value = tl.zeros((BLOCK,), dtype=tl.float32) + tl.load(levels_ptr)
        for level in tl.static_range(1, LEVELS):
            step = tl.load(levels_ptr + level) - tl.load(levels_ptr + level - 1)
            value += tl.where(ratio > tl.load(bounds_ptr + level - 1), step, 0.0)
        tl.store(values_ptr + row * FEATURES + at, value.to(tl.int8), mask=at < FEATURES)
