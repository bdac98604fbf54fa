"""Checks of shapes, the scale and the tiles of ops over the scores of attention; imports no Triton.

Shapes: `B` samples, `H` heads, `N` queries, `M` keys, `D` head dim.
"""

from torch import Tensor

from s2q.common.errors import InvalidInputError
from s2q.ops.architectures import Tile
from s2q.ops.dispatch import KernelUnavailableError

LOG2_E = 1.4426950408889634
"""Softmax is computed with powers of 2: exp(s) = 2^(s · log2(e))."""

HeadTiles = dict[tuple[int, bool], dict[int, Tile]]
"""Tiles of one architecture: by the bytes of an element and whether a mask differs from query to query (a whole tile of
it is read), by the most of D padded, ascending."""


def check_shapes(query: Tensor, key: Tensor, mask: Tensor | None, *, op: str) -> None:
    """Refuse queries, keys and a mask that do not fit together."""
    if query.ndim != 4 or key.ndim != 4 or query.shape[:2] != key.shape[:2] or query.shape[3] != key.shape[3]:
        raise InvalidInputError(
            f"{op}: got queries {list(query.shape)} and keys {list(key.shape)}; expected [B, H, N, D] and [B, H, M, D]"
        )
    if mask is not None:
        full = (*query.shape[:3], key.shape[2])
        sizes = zip(reversed(mask.shape), reversed(full), strict=False)
        if mask.ndim > 4 or any(size not in (1, wanted) for size, wanted in sizes):
            raise InvalidInputError(
                f"{op}: got a mask of shape {list(mask.shape)}; expected it to broadcast to {list(full)}"
            )


def score_scale(query: Tensor, scale: float | None) -> float:
    """Return the scale of the scores; None is 1 / √D."""
    return float(query.shape[-1] ** -0.5) if scale is None else scale


def find_tile(tiles: HeadTiles, head_dim: int, *, min_depth: int, itemsize: int, has_pair_mask: bool) -> Tile:
    """Return the tile for heads of a size, with `TILE_D`: D padded to a power of 2, at least `min_depth`.

    Raises:
        KernelUnavailableError: If the heads are too large.
    """
    padded = max(min_depth, 1 << (head_dim - 1).bit_length())
    for most, tile in tiles[itemsize, has_pair_mask].items():
        if padded <= most:
            return tile | {"TILE_D": padded}
    raise KernelUnavailableError(f"got heads of {head_dim} features; no tile is that wide")
