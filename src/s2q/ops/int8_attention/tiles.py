"""Tiles of the attention kernel. UNTUNED: chosen on paper and compiled without spills, never timed."""

from s2q.ops.architectures import Tile

PRECISIONS = {2: "native", 4: "tf32"}
"""Of the product with V, by the bytes of an element. tf32 errs by about 1e-3, a tenth of what int8 scores do."""

_HALF = {64: (128, 4, 3), 128: (128, 8, 3)}
_FULL = {64: (64, 8, 2), 128: (64, 8, 2)}
_MMA = {
    (2, False): _HALF,
    (2, True): {64: (64, 8, 2), 128: (32, 8, 2)},
    (4, False): _FULL,
    (4, True): {64: (32, 8, 2), 128: (32, 8, 2)},
}

_SMALL = _MMA | {(2, False): {64: (128, 4, 3), 128: (64, 8, 3)}, (2, True): {64: (32, 8, 2), 128: (32, 8, 2)}}

TILES: dict[int, dict[tuple[int, bool], dict[int, tuple[int, int, int]]]] = {
    **dict.fromkeys((80, 86, 89, 90, 100, 103), _MMA),
    120: _SMALL,
}
"""By architecture, bytes of an element, and whether a mask differs from query to query, so that a whole tile of it is
read: by the most of D padded, queries of a tile, warps of a program and loads in flight."""

MIN_DEPTH = 32
"""The shortest inner dimension of an int8 product."""


def attention_tile(head_dim: int, *, itemsize: int, has_pair_mask: bool, architecture: int) -> Tile | None:
    """Return the tile for heads of a size; None if they are too large. A tile has one block of keys."""
    padded = max(MIN_DEPTH, 1 << (head_dim - 1).bit_length())
    for most, (side, num_warps, num_stages) in TILES[architecture][itemsize, has_pair_mask].items():
        if padded <= most:
            sizes = {"TILE_N": side, "TILE_D": padded, "PRECISION": PRECISIONS[itemsize]}
            return sizes | {"num_warps": num_warps, "num_stages": num_stages}
    return None
