"""Tiles of the column sums. UNTUNED: chosen on paper and compiled without spills, never timed."""

from s2q.ops.architectures import Tile

PRECISIONS = {2: {256: "native"}, 4: {64: "tf32x3", 256: "tf32"}}
"""Of the products, by the bytes of an element and the most of D padded that it is for. Three products of tf32 do not
fit into the registers of wide heads; one puts an error of about 1e-3 on the sums, an eighth of that of bf16."""

_HALF = {128: (128, 8), 256: (64, 4)}
_FULL = {64: (32, 4), 128: (64, 8), 256: (32, 4)}
_MMA = {(2, False): _HALF, (2, True): {256: (64, 4)}, (4, False): _FULL, (4, True): _FULL}
_BLACKWELL = _MMA | {(2, True): {256: (64, 8)}}

TILES: dict[int, dict[tuple[int, bool], dict[int, tuple[int, int]]]] = dict.fromkeys(
    (80, 86, 89, 90), _MMA
) | dict.fromkeys((100, 103, 120), _BLACKWELL)
"""By architecture, bytes of an element, and whether a mask differs from query to query, so that a whole tile of it is
read: by the most of D padded, queries and keys of a tile and warps of a program, ascending. At most 82 KiB of shared
memory where an architecture has 99."""


def colsum_tile(head_dim: int, *, itemsize: int, has_pair_mask: bool, architecture: int) -> Tile | None:
    """Return the tile for heads of a size; None if they are too large. A pair mask differs from query to query."""
    padded = max(16, 1 << (head_dim - 1).bit_length())
    for most, (side, num_warps) in TILES[architecture][itemsize, has_pair_mask].items():
        if padded <= most:
            precision = next(name for widest, name in PRECISIONS[itemsize].items() if padded <= widest)
            sizes = {"TILE_N": side, "TILE_M": side, "TILE_D": padded, "PRECISION": precision}
            return sizes | {"num_warps": num_warps, "num_stages": 2}
    return None
