"""Product of few rows with a packed weight on tensor cores, whose speed is that of reading the weight.

Even and odd in features, in the low and the high nibbles, are products of their own, so that nothing has to be
interleaved. Codes are exact in the dtype of x; sums and scales are fp32, and rounded once.

Shapes: `M` rows, `K` in features, `O` out features, `P` packed bytes of a row (`core.packing`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2q.core.packing import packed_width
from s2q.ops.dispatch import architecture_of, launch
from s2q.ops.triton_math import INTERPRETING, matrix_product
from s2q.ops.weight_only_matmul import reference
from s2q.ops.weight_only_matmul.tiles import TILES


def weight_only_matmul(
    x: Tensor, w_codes: Tensor, w_scale: Tensor, *, bias: Tensor | None = None, w_bits: int = 8
) -> Tensor:
    """Multiply rows, fp32, fp16 or bf16, with the dequantized weight; see `reference.weight_only_matmul`.

    [O, G] scales, and more than `FEW_ROWS` rows, are left to the reference.
    """
    rows, depth = x.shape
    columns = len(w_codes)
    is_packed = w_codes.dtype == torch.uint8 and w_bits <= 4
    fits = w_codes.shape[1] == (packed_width(w_bits, depth) if is_packed else depth)
    if rows > reference.FEW_ROWS or w_scale.ndim != 1 or not fits:
        return reference.weight_only_matmul(x, w_codes, w_scale, bias=bias, w_bits=w_bits)
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    w_codes = w_codes if is_packed else w_codes.view(torch.int8)
    x, w_codes = (matrix if matrix.stride(1) == 1 else matrix.contiguous() for matrix in (x, w_codes))
    tile = TILES[architecture_of(x)]
    launch(
        weight_only_kernel,
        (triton.cdiv(columns, tile["COLUMNS"]),),
        x,
        w_codes,
        w_scale.float().contiguous(),
        out if bias is None else bias.contiguous(),
        out,
        rows,
        columns,
        x.stride(0),
        w_codes.stride(0),
        HAS_BIAS=bias is not None,
        DEPTH=depth,
        PACKED=is_packed,
        PRECISION=product_precision(x.dtype),
        INTERPRET=INTERPRETING,
        **tile,
    )
    return out


def product_precision(dtype: torch.dtype) -> str:
    """Return the precision of `weight_only_kernel` for the dtype of x."""
    return "tf32x3" if dtype == torch.float32 else "native"


@triton.jit(do_not_specialize=["rows"])
def weight_only_kernel(
    x_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    out_ptr,
    rows,
    columns,
    x_stride,
    w_stride,
    HAS_BIAS: tl.constexpr,
    DEPTH: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Compute [rows, COLUMNS] of the result."""
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    here = (row < rows)[:, None]
    w_row = tl.where(column < columns, column, 0).to(tl.int64)
    x_rows = x_ptr + row[:, None] * x_stride
    w_rows = w_ptr + w_row[:, None] * w_stride
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    bytes_in_row: tl.constexpr = (DEPTH + 1) // 2 if PACKED else DEPTH
    for start in range(0, bytes_in_row, WIDTH):
        at = (start + tl.arange(0, WIDTH))[None, :]
        w = tl.load(w_rows + at, mask=at < bytes_in_row, other=0)
        if PACKED:
            even = tl.load(x_rows + 2 * at, mask=here & (2 * at < DEPTH), other=0.0)
            odd = tl.load(x_rows + 2 * at + 1, mask=here & (2 * at + 1 < DEPTH), other=0.0)
            low = ((w & 15).to(tl.float32) - 8.0).to(even.dtype)
            high = ((w >> 4).to(tl.float32) - 8.0).to(even.dtype)
            sums += matrix_product(even, tl.trans(low), PRECISION, INTERPRET)
            sums += matrix_product(odd, tl.trans(high), PRECISION, INTERPRET)
        else:
            x = tl.load(x_rows + at, mask=here & (at < DEPTH), other=0.0)
            sums += matrix_product(x, tl.trans(w.to(tl.float32).to(x.dtype)), PRECISION, INTERPRET)
    total = sums * tl.load(w_scale_ptr + w_row)[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + w_row).to(tl.float32)[None, :]
    out_at = row[:, None] * columns + column[None, :]
    valid = here & (column < columns)[None, :]
    tl.store(out_ptr + out_at, total.to(out_ptr.dtype.element_ty), mask=valid)
