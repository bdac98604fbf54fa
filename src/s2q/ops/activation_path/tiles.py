"""How the kernels of this op are cut up. UNTUNED: chosen on paper and compiled without spills, never timed."""

from dataclasses import dataclass

MAX_ORDER = 128
"""Of a factor inside the kernel; with larger ones the rotation runs outside of it."""

MAX_GRID = {"bf16": 128 * 128, "tf32x3": 64 * 64}
"""Elements of a token's padded [n1, n2] grid, which has to fit into registers, by the precision of the products."""

MAX_GRID_BEFORE_90 = {"bf16": 64 * 64, "tf32x3": 32 * 32}
"""The same below compute capability 9.0, where tensor cores read both operands from registers."""


@dataclass(frozen=True, kw_only=True)
class RotationTile:
    """A token's grid with both sides padded to powers of two, and how it is worked on.

    Programs have one stage: with more, the compiler keeps the x of several tokens in shared memory.

    Attributes:
        rows: n1 padded, at least 16.
        columns: n2 padded, at least 16.
        tokens: That one program handles, so that it loads the factors once.
        num_warps: Of a program.
    """

    rows: int
    columns: int
    tokens: int
    num_warps: int


def rotation_tile(n1: int, n2: int, *, precision: str, capability: tuple[int, int]) -> RotationTile | None:
    """Return the tile for a grid of a token's features; None if it is too large for the kernel.

    Args:
        n1: Rows of the grid.
        n2: Columns.
        precision: Of the products, a key of `MAX_GRID`.
        capability: Of the GPU.
    """
    rows, columns = padded(n1), padded(n2)
    elements = rows * columns
    is_old = capability < (9, 0)
    if elements > (MAX_GRID_BEFORE_90 if is_old else MAX_GRID)[precision]:
        return None
    num_warps = 4 if elements <= (32 * 32 if is_old else 64 * 64) else 8
    return RotationTile(rows=rows, columns=columns, tokens=8, num_warps=num_warps)


def row_block(features: int) -> tuple[int, int]:
    """Return features at a time and warps for quantization without rotation.

    Args:
        features: I.
    """
    return min(2048, padded(features)), 4 if features <= 2048 else 8


def padded(order: int) -> int:
    """Return the next power of two that a product of matrices can have as a side.

    Args:
        order: At least 1.
    """
    return max(16, 1 << (order - 1).bit_length())
