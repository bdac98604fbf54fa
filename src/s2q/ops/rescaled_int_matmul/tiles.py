"""Tiles of the integer product, per architecture and number of rows.

UNTUNED, all of it: chosen on paper (shared memory, registers, wave counts) and compiled without spills, never timed.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MatmulTile:
    """Tile of one program: rows (tokens), columns (out features), depth (in features at a time), loads in flight."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


UNPACK_FROM_ROWS = 256
"""From so many rows on, packed weights are unpacked once a call into int8 instead of in every tile."""

GROUP_ROWS = 8
"""Tiles of rows that are worked on together, so that they share the columns of w in the cache."""

UNPACK_BLOCK = 1024
"""Bytes that a program unpacks."""

_FEW = (16, MatmulTile(rows=16, columns=64, depth=128, num_warps=4, num_stages=3))
_SOME = (255, MatmulTile(rows=64, columns=64, depth=128, num_warps=4, num_stages=3))
_DEEP = (1 << 31, MatmulTile(rows=128, columns=128, depth=128, num_warps=8, num_stages=3))
_SHALLOW = (1 << 31, MatmulTile(rows=128, columns=128, depth=64, num_warps=8, num_stages=3))

TILES: dict[int, tuple[tuple[int, MatmulTile], ...]] = {
    80: (_FEW, _SOME, _DEEP),
    86: (_FEW, _SOME, _SHALLOW),
    89: (_FEW, _SOME, _SHALLOW),
    90: (_FEW, _SOME, _DEEP),
    100: (_FEW, _SOME, _DEEP),
    103: (_FEW, _SOME, _DEEP),
    120: (_FEW, _SOME, _SHALLOW),
}
"""By architecture: pairs of the most rows that a tile is for and the tile, ascending."""


def matmul_tile(rows: int, depth: int, architecture: int) -> MatmulTile:
    """Return the tile for a product of K = depth; K % 16 ≠ 0 is read byte by byte in a large tile's registers."""
    return next(tile for most, tile in TILES[architecture] if (rows if depth % 16 == 0 else min(rows, 64)) <= most)
