"""Local means of a video's tokens: cubes of neighbouring frames, rows and columns, and the mean token of each.

Cubes start at the first token; those at the far edges are smaller where the sizes do not come out even.

Example: five tokens in a row, cubes of 1 x 1 x 2: [1, 3 | 2, 6 | 7] have the means 2, 4 and 7.

Shapes: `F`, `H`, `W` tokens along time, a column and a row; `f`, `h`, `w` cubes along them, rounded up; `I` features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def cube_means(video: Tensor, cube: tuple[int, int, int]) -> Tensor:
    """Return the mean token of each cube of a video [..., F, H, W, I], fp32 [..., f, h, w, I]."""
    total = video.float()
    for dim, side in zip((-4, -3, -2), cube, strict=True):
        size = total.shape[dim]
        padding = [0, 0] * (-1 - dim) + [0, -size % side]
        padded = F.pad(total, padding)
        total = padded.reshape(*padded.shape[:dim], -1, side, *padded.shape[dim + 1 :]).sum(dim=dim)
        tokens = (size - torch.arange(0, size, side, device=total.device, dtype=total.dtype)).clamp(max=side)
        total = total / tokens.view(-1, *[1] * (-1 - dim))
    return total


def spread(means: Tensor, cube: tuple[int, int, int], sizes: tuple[int, int, int]) -> Tensor:
    """Give every token of F, H and W what its cube has: [..., f, h, w, I] becomes [..., F, H, W, I]."""
    for dim, side, size in zip((-4, -3, -2), cube, sizes, strict=True):
        means = means.repeat_interleave(side, dim=dim).narrow(dim, 0, size)
    return means
