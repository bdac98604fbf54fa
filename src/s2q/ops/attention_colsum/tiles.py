"""How the column sums are cut up. UNTUNED: chosen on paper and compiled without spills, never timed."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ColsumTile:
    """What a step of the two kernels works on.

    Attributes:
        queries: In a tile.
        keys: In a tile.
        head_dim: D, padded.
        num_warps: Of a program.
        num_stages: Loads in flight.
    """

    queries: int
    keys: int
    head_dim: int
    num_warps: int
    num_stages: int


MAX_HEAD_DIM = {2: 256, 4: 64}
"""Padded, by the bytes of an element; more does not fit into registers and shared memory everywhere."""


def colsum_tile(head_dim: int, *, itemsize: int, has_pair_mask: bool) -> ColsumTile | None:
    """Return the tile for heads of a size; None if they are too large.

    Args:
        head_dim: D.
        itemsize: Bytes of an element of the queries; fp32 takes smaller tiles.
        has_pair_mask: Whether a mask differs from query to query, so that a whole tile of it is read.
    """
    padded = max(16, 1 << (head_dim - 1).bit_length())
    if padded > MAX_HEAD_DIM[itemsize]:
        return None
    if itemsize == 4:
        side = 32
    else:
        side = 128 if padded <= 128 and not has_pair_mask else 64
    return ColsumTile(queries=side, keys=side, head_dim=padded, num_warps=8 if side == 128 else 4, num_stages=2)
