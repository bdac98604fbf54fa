"""Tiles of the weight-only product. UNTUNED: chosen on paper and compiled without spills, never timed."""

from s2q.ops.architectures import SHARED_BYTES, Tile

TILES: dict[int, Tile] = dict.fromkeys(
    SHARED_BYTES, {"ROWS": 16, "COLUMNS": 32, "WIDTH": 128, "num_warps": 4, "num_stages": 3}
)
"""By architecture: rows (at least a call's), columns (out features) and bytes of w at a time. At most 40 KiB of shared
memory, which every one has."""
