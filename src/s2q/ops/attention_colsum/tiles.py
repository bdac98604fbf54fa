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


MAX_HEAD_DIM = 256
"""Padded; more does not fit into shared memory."""


def colsum_tile(head_dim: int, *, itemsize: int) -> ColsumTile | None:
    """Return the tile for heads of a size; None if they are too large.

    Args:
        head_dim: D.
        itemsize: Bytes of an element of the queries; fp32 takes smaller tiles.
    """
    padded = max(16, 1 << (head_dim - 1).bit_length())
    if padded > MAX_HEAD_DIM:
        return None
    side = 128 if padded <= 128 and itemsize == 2 else 64
    return ColsumTile(queries=side, keys=side, head_dim=padded, num_warps=8 if side == 128 else 4, num_stages=2)
