"""Local means of a video's tokens: cubes of neighbouring frames, rows and columns, and the mean token of each.

A token is the mean of its cube and the difference from that, so a linear multiplies the mean once a cube:

    W x = W m + W (x - m),    m: dequantized codes of the mean, whatever its rounding

Cubes start at the first token; those at the far edges are smaller where the sizes do not come out even.

Example: five tokens in a row, cubes of 1 x 1 x 2: [1, 3 | 2, 6 | 7] have the means 2, 4 and 7.

Shapes: `F`, `H`, `W` tokens along time, a column and a row; `f`, `h`, `w` cubes along them, rounded up; `I` features;
`B` samples of `N` tokens, M = B · N; `C` cubes of all samples.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class QuantizedMeans(NamedTuple):
    """The quantized mean tokens of cubes, after the path of the input, and a row of zeros for tokens without a cube.

    Attributes:
        codes: int8 [C + 1, I]; the last row is 0.
        scale: fp32 [C + 1, 1].
        rows: int32 [M], the row of each token's cube.
    """

    codes: Tensor
    scale: Tensor
    rows: Tensor

    def spread_products(self, products: Tensor) -> Tensor:
        """Give every token what its cube has: [C + 1, k] becomes [M, k]."""
        return products.index_select(0, self.rows)

    def difference(self, y: Tensor) -> Tensor:
        """Return what tokens y [M, I] differ by from the dequantized means of their cubes, fp32 [M, I]."""
        return y.float() - self.spread_products(self.codes.float() * self.scale)


def cube_rows(
    sizes: tuple[int, int, int],
    cube: tuple[int, int, int],
    *,
    before: int,
    after: int,
    samples: int,
    device: torch.device | str,
) -> Tensor:
    """Return the number of each token's cube, int32 [B · N]; `before` and `after` count the tokens around the video.

    Cubes are numbered in the order of `cube_means`, sample by sample; other tokens have the number C.
    """
    counts = [-(-size // side) for size, side in zip(sizes, cube, strict=True)]
    numbers = torch.arange(counts[0] * counts[1] * counts[2], dtype=torch.int32, device=device)
    video = spread(numbers.view(*counts, 1), cube, sizes).reshape(1, -1)
    of_samples = torch.arange(samples, dtype=torch.int32, device=device).unsqueeze(1) * len(numbers)
    return F.pad(video + of_samples, (before, after), value=samples * len(numbers)).flatten()


def cube_means(video: Tensor, cube: tuple[int, int, int]) -> Tensor:
    """Return the mean token of each cube of a video [..., F, H, W, I], fp32 [..., f, h, w, I]."""
    total = video.float()
    for dim, side in zip((-4, -3, -2), cube, strict=True):
        size = total.shape[dim]
        padded = F.pad(total, [0, 0] * (-1 - dim) + [0, -size % side]) if size % side else total
        total = padded.reshape(*padded.shape[:dim], -1, side, *padded.shape[dim + 1 :]).sum(dim=dim)
        tokens = (size - torch.arange(0, size, side, device=total.device, dtype=total.dtype)).clamp(max=side)
        total = total / tokens.view(-1, *[1] * (-1 - dim))
    return total


def spread(means: Tensor, cube: tuple[int, int, int], sizes: tuple[int, int, int]) -> Tensor:
    """Give every token of F, H and W what its cube has: [..., f, h, w, I] becomes [..., F, H, W, I]."""
    *rest, frames, height, width, features = means.shape
    each = means.reshape(*rest, frames, 1, height, 1, width, 1, features)
    each = each.expand(*rest, frames, cube[0], height, cube[1], width, cube[2], features)
    padded = each.reshape(*rest, frames * cube[0], height * cube[1], width * cube[2], features)
    return padded[..., : sizes[0], : sizes[1], : sizes[2], :]
