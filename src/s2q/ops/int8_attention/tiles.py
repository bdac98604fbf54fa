"""Tiles of the attention kernel. UNTUNED: chosen on paper and compiled without spills, never timed."""

from s2q.ops.architectures import Tile
from s2q.ops.attention_inputs import HeadTiles

MIN_DEPTH = 32
"""The shortest inner dimension of an int8 product."""


def _tile(queries: int, num_warps: int, num_stages: int, *, precision: str = "native") -> Tile:
    """A tile of queries over one block of keys, and the precision of the product with V."""
    return {"TILE_N": queries, "PRECISION": precision, "num_warps": num_warps, "num_stages": num_stages}


def _full(queries: int) -> Tile:
    """A tile for fp32; tf32 errs by about 1e-3, a tenth of what int8 scores do."""
    return _tile(queries, 8, 2, precision="tf32")


_MMA = {
    (2, False): {64: _tile(128, 4, 3), 128: _tile(128, 8, 3)},
    (2, True): {64: _tile(64, 8, 2), 128: _tile(32, 8, 2)},
    (4, False): {128: _full(64)},
    (4, True): {128: _full(32)},
}
_SMALL = _MMA | {(2, False): {64: _tile(128, 4, 3), 128: _tile(64, 8, 3)}, (2, True): {128: _tile(32, 8, 2)}}

TILES: dict[int, HeadTiles] = {**dict.fromkeys((80, 86, 89, 90, 100, 103), _MMA), 120: _SMALL}
"""By architecture."""
