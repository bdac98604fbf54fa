"""Tiles of the column sums. UNTUNED: chosen on paper and compiled without spills, never timed."""

from s2q.ops.architectures import Tile
from s2q.ops.attention_inputs import HeadTiles

MIN_DEPTH = 16
"""The shortest inner dimension of a product."""


def _square(side: int, num_warps: int, precision: str) -> Tile:
    """A tile with as many queries as keys, and the precision of its products.

    Three products of tf32 do not fit into the registers of wide heads; one puts an error of about 1e-3 on the sums, an
    eighth of that of bf16.
    """
    sizes = {"TILE_N": side, "TILE_M": side, "PRECISION": precision}
    return sizes | {"num_warps": num_warps, "num_stages": 2}


_HALF = {128: _square(128, 8, "native"), 256: _square(64, 4, "native")}
_FULL = {64: _square(32, 4, "tf32x3"), 128: _square(64, 8, "tf32"), 256: _square(32, 4, "tf32")}
_MMA = {(2, False): _HALF, (2, True): {256: _square(64, 4, "native")}, (4, False): _FULL, (4, True): _FULL}
_BLACKWELL = _MMA | {(2, True): {256: _square(64, 8, "native")}}

TILES: dict[int, HeadTiles] = dict.fromkeys((80, 86, 89, 90), _MMA) | dict.fromkeys((100, 103, 120), _BLACKWELL)
"""By architecture. At most 82 KiB of shared memory where an architecture has 99."""
