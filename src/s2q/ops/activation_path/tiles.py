"""Tiles of the kernels of this op. UNTUNED: chosen on paper and compiled without spills, never timed."""

from s2q.ops.architectures import Tile

MAX_ORDER = 128
"""Of a factor inside the kernel; with larger ones the rotation runs outside of it."""

PRECISIONS = ("bf16", "tf32x3")
"""Of the products."""

_Grids = dict[str, tuple[tuple[int, int], ...]]

_MMA: _Grids = {"bf16": ((32 * 32, 4), (64 * 64, 8)), "tf32x3": ((32 * 32, 4),)}  # both operands in registers
_WGMMA: _Grids = {"bf16": ((64 * 64, 4), (128 * 128, 8)), "tf32x3": ((64 * 64, 4),)}  # one or both in shared memory
# Sums in a memory of their own.
_TCGEN05: _Grids = {"bf16": ((64 * 64, 4), (128 * 128, 8)), "tf32x3": ((32 * 32, 4), (64 * 64, 8))}

TILES: dict[int, _Grids] = {80: _MMA, 86: _MMA, 89: _MMA, 90: _WGMMA, 100: _TCGEN05, 103: _TCGEN05, 120: _MMA}
"""By architecture and precision: pairs of the most elements of a token's padded [n1, n2] grid, which has to fit into
registers, and warps of a program, ascending."""


MAX_RANK = 256
"""Of a low-rank branch inside the kernel, whose sums are in registers."""


def low_rank_tile(rank: int) -> Tile | None:
    """Return the tile of the low-rank branch for a rank, a power of two from 16; None if it is too large.

    Tokens side by side are as few as tensor cores take: most of the work is to read them, in many programs.
    """
    if rank > MAX_RANK:
        return None
    return {"TOKENS": 16, "BLOCK": 128 if rank <= 64 else 64, "num_warps": 4, "num_stages": 2}


def rotation_tile(n1: int, n2: int, *, precision: str, architecture: int) -> Tile | None:
    """Return the tile for a token's grid [n1, n2] of features; None if it is too large for the kernel.

    It has the sides padded and the tokens of a program, which loads the factors once. Programs have one stage: with
    more, the compiler keeps the x of several tokens in shared memory.
    """
    rows, columns = padded(n1), padded(n2)
    for most, num_warps in TILES[architecture][precision]:
        if rows * columns <= most and max(n1, n2) <= MAX_ORDER:
            return {"ROWS": rows, "COLUMNS": columns, "TOKENS": 8, "num_warps": num_warps, "num_stages": 1}
    return None


def row_block(features: int) -> tuple[int, int]:
    """Return features at a time and warps for quantization without rotation, of tokens with I `features`."""
    return min(2048, padded(features)), 4 if features <= 2048 else 8


def padded(order: int) -> int:
    """Return the next power of two that a product of matrices can have as a side."""
    return max(16, 1 << (order - 1).bit_length())
