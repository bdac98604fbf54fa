"""Tiles of the weight-only product. UNTUNED: chosen on paper and compiled without spills, never timed."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WeightOnlyTile:
    """Tile of one program: rows (at least a call's), columns (out features), bytes of w at a time, loads in flight."""

    rows: int
    columns: int
    width: int
    num_warps: int
    num_stages: int


_TILE = WeightOnlyTile(rows=16, columns=32, width=128, num_warps=4, num_stages=3)

TILES: dict[int, WeightOnlyTile] = dict.fromkeys((80, 86, 89, 90, 100, 103, 120), _TILE)
"""By architecture; at most 40 KiB of shared memory, which every one has."""
