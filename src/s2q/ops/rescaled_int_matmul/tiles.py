"""Tiles of the integer product, per architecture and number of rows.

UNTUNED, all of it: chosen on paper (shared memory, registers, wave counts) and compiled without spills, never timed.
"""

from s2q.ops.architectures import Tile

UNPACK_FROM_ROWS = 256
"""From so many rows on, packed weights are unpacked once a call into int8 instead of in every tile."""

GROUP_ROWS = 8
"""Tiles of rows that are worked on together, so that they share the columns of w in the cache."""

UNPACK_BLOCK = 1024
"""Bytes that a program unpacks."""

_FEW = (16, {"ROWS": 16, "COLUMNS": 64, "BLOCK": 128, "num_warps": 4, "num_stages": 3})
_SOME = (255, {"ROWS": 64, "COLUMNS": 64, "BLOCK": 128, "num_warps": 4, "num_stages": 3})
_DEEP = (1 << 31, {"ROWS": 128, "COLUMNS": 128, "BLOCK": 128, "num_warps": 8, "num_stages": 3})
_SHALLOW = (1 << 31, {"ROWS": 128, "COLUMNS": 128, "BLOCK": 64, "num_warps": 8, "num_stages": 3})

TILES: dict[int, tuple[tuple[int, Tile], ...]] = {
    **dict.fromkeys((80, 90, 100, 103), (_FEW, _SOME, _DEEP)),
    **dict.fromkeys((86, 89, 120), (_FEW, _SOME, _SHALLOW)),
}
"""By architecture: pairs of the most rows that a tile is for and the tile, ascending; ROWS are tokens, COLUMNS out
features, BLOCK in features at a time."""


def matmul_tile(rows: int, depth: int, architecture: int) -> Tile:
    """Return the tile for a product of K = depth; K % 16 ≠ 0 is read byte by byte in a large tile's registers."""
    return next(tile for most, tile in TILES[architecture] if (rows if depth % 16 == 0 else min(rows, 64)) <= most)
