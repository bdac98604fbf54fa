"""Tokens in int8 levels on the CPU, in chunks of rows that stay in the caches; the search compiled (`ops.fused`)."""

import torch
from torch import Tensor

from s2q.core.qparams import token_scale_of_levels
from s2q.ops.fused import passes
from s2q.ops.passes import DTYPES
from s2q.ops.token_levels import reference

CHUNK = 1 << 18
"""Values in a chunk."""


def token_levels(x: Tensor, levels: Tensor, clip_ratio: Tensor | None = None, *, unit: float) -> tuple[Tensor, Tensor]:
    """Quantize each token to the nearest levels; see `reference.token_levels`: its bits, except where a NaN is."""
    fused = passes() if x.dtype in DTYPES and x.stride(1) == 1 else None
    values = torch.empty(x.shape, dtype=torch.int8, device="cpu")
    scales = torch.empty(len(x), 1, dtype=torch.float32, device="cpu")
    step = max(1, CHUNK // max(1, x.shape[1]))
    per_row = clip_ratio is not None and clip_ratio.ndim > 0 and len(clip_ratio) == len(x)
    bounds = (levels[1:] + levels[:-1]) / 2
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        ratio = clip_ratio[part] if per_row and clip_ratio is not None else clip_ratio
        if fused is None:
            values[part], scales[part] = reference.token_levels(x[part], levels, ratio, unit=unit)
            continue
        scales[part] = token_scale_of_levels(x[part], unit=unit, clip_ratio=ratio)
        fused.nearest(x[part], scales[part], levels, bounds, out=values[part])
    return values, scales
