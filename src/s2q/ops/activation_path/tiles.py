"""How the kernels of this op are cut up. UNTUNED: chosen on paper and compiled without spills, never timed."""

from dataclasses import dataclass

MAX_ORDER = 128
"""Of a factor inside the kernel; with larger ones the rotation runs outside of it."""

MAX_GRID = 128 * 128
"""Elements of a token's padded [n1, n2] grid, which has to fit into registers."""


@dataclass(frozen=True, kw_only=True)
class RotationTile:
    """A token's grid with both sides padded to powers of two, and how it is worked on.

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


def rotation_tile(n1: int, n2: int, *, precision: str) -> RotationTile | None:
    """Return the tile for a grid of a token's features; None if it is too large for the kernel.

    Args:
        n1: Rows of the grid.
        n2: Columns.
        precision: Of the products, see `triton_math.matrix_product`; fp32 needs more registers.
    """
    rows, columns = padded(n1), padded(n2)
    elements = rows * columns
    if elements > MAX_GRID:
        return None
    num_warps = 4 if elements <= 64 * 64 else 8
    if precision != "bf16" and elements > 64 * 64:
        num_warps = 16
    return RotationTile(rows=rows, columns=columns, tokens=8, num_warps=num_warps)


def row_block(features: int) -> tuple[int, int]:
    """Return features at a time and warps for quantization without rotation.

    Args:
        features: I.
    """
    block = min(4096, padded(features))
    return block, 4 if block <= 2048 else 8


def padded(order: int) -> int:
    """Return the next power of two that a product of matrices can have as a side.

    Args:
        order: At least 1.
    """
    return max(16, 1 << (order - 1).bit_length())
