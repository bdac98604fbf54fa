"""Tokens in int8 levels on the CPU: the reference in chunks of rows, whose intermediate results stay in the caches."""

import torch
from torch import Tensor

from s2q.ops.token_levels import reference

CHUNK = 1 << 18
"""Values in a chunk."""


def token_levels(x: Tensor, levels: Tensor, clip_ratio: Tensor | None = None, *, unit: float) -> tuple[Tensor, Tensor]:
    """Quantize each token to the nearest levels; see `reference.token_levels`, whose bits it has."""
    values = torch.empty(x.shape, dtype=torch.int8, device="cpu")
    scales = torch.empty(len(x), 1, dtype=torch.float32, device="cpu")
    step = max(1, CHUNK // max(1, x.shape[1]))
    per_row = clip_ratio is not None and clip_ratio.ndim > 0 and len(clip_ratio) == len(x)
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        ratio = clip_ratio[part] if per_row and clip_ratio is not None else clip_ratio
        values[part], scales[part] = reference.token_levels(x[part], levels, ratio, unit=unit)
    return values, scales
