"""How the integer product is cut up, per architecture and number of rows.

UNTUNED, all of it: chosen on paper (shared memory, registers, wave counts) and compiled without spills, never timed.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MatmulTile:
    """What one program computes and how.

    Attributes:
        rows: Of x (tokens) in a tile.
        columns: Out features in a tile.
        depth: In features that are loaded at a time.
        num_warps: Of a program.
        num_stages: Loads in flight.
    """

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

_FEW = MatmulTile(rows=16, columns=64, depth=128, num_warps=4, num_stages=3)
_SOME = MatmulTile(rows=64, columns=64, depth=128, num_warps=4, num_stages=3)

TILES: dict[tuple[int, int], tuple[tuple[int, MatmulTile], ...]] = {
    (8, 0): (
        (16, _FEW),
        (255, _SOME),
        (1 << 31, MatmulTile(rows=128, columns=128, depth=128, num_warps=8, num_stages=3)),
    ),
    (8, 9): (
        (16, _FEW),
        (255, _SOME),
        (1 << 31, MatmulTile(rows=128, columns=128, depth=64, num_warps=8, num_stages=3)),
    ),
    (9, 0): (
        (16, _FEW),
        (255, _SOME),
        (1 << 31, MatmulTile(rows=128, columns=128, depth=128, num_warps=8, num_stages=3)),
    ),
}
"""By compute capability: pairs of the most rows that a tile is for and the tile, ascending."""


def matmul_tile(rows: int, depth: int, capability: tuple[int, int]) -> MatmulTile:
    """Return the tile for a product.

    Args:
        rows: M.
        depth: K; one that is no multiple of 16 is read byte by byte, which needs the registers of a large tile.
        capability: Of the GPU; one that is not listed takes what the nearest older one does.
    """
    listed = max((known for known in TILES if known <= capability), default=min(TILES))
    return next(tile for most, tile in TILES[listed] if (rows if depth % 16 == 0 else min(rows, 64)) <= most)
