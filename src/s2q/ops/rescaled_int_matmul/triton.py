"""Rescaled integer product on int8 tensor cores; scales, bias and branch are applied before the only write.

Packed weights (two codes a byte) are unpacked in the loop for few rows, where reading w is what takes time, and once
a call into an int8 scratch for many, where every tile would repeat the work (and if K is no multiple of 32).

The sums are exact. Afterwards a multiplication and an addition may be fused, so that fp32 results can differ from the
reference in the last bit.

Shapes: `M` tokens, `K` in features, `O` out features, `P` packed bytes of a row (`core.packing`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2q.common.errors import InvalidInputError
from s2q.core.packing import packed_width
from s2q.ops.dispatch import architecture_of, launch
from s2q.ops.rescaled_int_matmul.tiles import GROUP_ROWS, UNPACK_BLOCK, UNPACK_FROM_ROWS, matmul_tile
from s2q.ops.triton_math import INTERPRETING, matrix_product


def rescaled_int_matmul(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    *,
    bias: Tensor | None = None,
    low_rank_input: Tensor | None = None,
    low_rank_weight: Tensor | None = None,
    shared_output: Tensor | None = None,
    shared_rows: Tensor | None = None,
    x_bits: int = 8,
    w_bits: int = 8,
    out_dtype: torch.dtype,
) -> Tensor:
    """Multiply codes and rescale the sums; see `reference.rescaled_int_matmul`.

    Rows of codes may be strided, w_scale is [O], the result is fp32, fp16 or bf16; x_bits makes no difference.

    Raises:
        InvalidInputError: If the shapes do not fit.
    """
    rows, depth = x_codes.shape
    columns = w_codes.shape[0]
    is_packed = w_codes.dtype == torch.uint8 and w_bits <= 4
    width = packed_width(w_bits, depth) if is_packed else depth
    if w_codes.shape[1] != width or x_scale.numel() != rows or w_scale.shape != (columns,):
        raise InvalidInputError(
            f"rescaled_int_matmul: got codes {list(x_codes.shape)} and {list(w_codes.shape)} with scales "
            f"{list(x_scale.shape)} and {list(w_scale.shape)}; expected [M, K], [O, {width}], [M, 1] and [O]"
        )
    out = torch.empty(rows, columns, dtype=out_dtype, device=x_codes.device)
    if out.numel() == 0:
        return out
    if is_packed and (rows >= UNPACK_FROM_ROWS or depth % 32 != 0):
        w_codes, is_packed = unpack_nibbles(w_codes, in_features=depth), False
    elif w_codes.dtype == torch.uint8 and not is_packed:
        w_codes = w_codes.view(torch.int8)
    x_codes, w_codes = (codes if codes.stride(1) == 1 else codes.contiguous() for codes in (x_codes, w_codes))
    tile = matmul_tile(rows, depth, architecture_of(x_codes))
    programs = triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(columns, tile["COLUMNS"])
    launch(
        rescaled_matmul_kernel,
        (programs,),
        x_codes,
        x_scale.float().contiguous(),
        w_codes,
        w_scale.float().contiguous(),
        out if bias is None else bias.contiguous(),
        out if low_rank_input is None else low_rank_input.contiguous(),
        out if low_rank_weight is None else low_rank_weight.contiguous(),
        out if shared_output is None else shared_output.contiguous(),
        out if shared_rows is None else shared_rows.contiguous(),
        out,
        rows,
        columns,
        x_codes.stride(0),
        w_codes.stride(0),
        HAS_BIAS=bias is not None,
        HAS_SHARED=shared_output is not None,
        DEPTH=depth,
        PACKED=is_packed,
        GROUP=GROUP_ROWS,
        **branch_constants(low_rank_weight, out_dtype),
        INTERPRET=INTERPRETING,
        **tile,
    )
    return out


def unpack_nibbles(packed: Tensor, *, in_features: int) -> Tensor:
    """Unpack codes of up to 4 bits, uint8 [O, P], to int8 [O, K]; equal to `core.packing.unpack_codes`."""
    columns, width = packed.shape
    packed = packed if packed.stride(1) == 1 else packed.contiguous()
    codes = torch.empty(columns, in_features, dtype=torch.int8, device=packed.device)
    if codes.numel():
        grid = (columns, triton.cdiv(width, UNPACK_BLOCK))
        constants = {"DEPTH": in_features, "BLOCK": UNPACK_BLOCK}
        launch(unpack_kernel, grid, packed, codes, packed.stride(0), **constants, num_warps=4)
    return codes


def branch_constants(low_rank_weight: Tensor | None, out_dtype: torch.dtype) -> dict[str, int | str]:
    """Return the constants of `rescaled_matmul_kernel` for the low-rank branch L [O, r]; rank 0 is none.

    The coefficients of a bf16 model are bf16 numbers, and lose nothing as such.
    """
    rank = 0 if low_rank_weight is None else low_rank_weight.shape[1]
    block = max(16, triton.next_power_of_2(rank))
    return {"RANK": rank, "RANK_BLOCK": block, "PRECISION": "bf16" if out_dtype == torch.bfloat16 else "tf32x3"}


@triton.jit
def _spread_nibbles(packed, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Bytes [ROWS, WIDTH] of two codes + 8 each -> codes int8 [ROWS, 2 · WIDTH], the low nibble first."""
    low = (packed & 15).to(tl.int8, bitcast=True) - 8
    high = (packed >> 4).to(tl.int8, bitcast=True) - 8
    return tl.reshape(tl.join(low, high), (ROWS, 2 * WIDTH))


@triton.jit
def unpack_kernel(packed_ptr, codes_ptr, packed_stride, DEPTH: tl.constexpr, BLOCK: tl.constexpr):
    """Unpack BLOCK bytes of one row."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    bytes_at = start + tl.arange(0, BLOCK)
    packed = tl.load(packed_ptr + row * packed_stride + bytes_at, mask=bytes_at < (DEPTH + 1) // 2, other=0)
    codes = tl.reshape(_spread_nibbles(packed[None, :], 1, BLOCK), (2 * BLOCK,))
    codes_at = 2 * start + tl.arange(0, 2 * BLOCK)
    tl.store(codes_ptr + row * DEPTH + codes_at, codes, mask=codes_at < DEPTH)


@triton.jit
def _load_rows(row_ptrs, start, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    """Load [n, BLOCK] from column `start` on, 0 beyond column LIMIT; unmasked where nothing lies beyond."""
    at = start + tl.arange(0, BLOCK)
    if LIMIT % BLOCK == 0:
        return tl.load(row_ptrs + at[None, :])
    else:
        return tl.load(row_ptrs + at[None, :], mask=(at < LIMIT)[None, :], other=0)


@triton.jit(do_not_specialize=["rows"])
def rescaled_matmul_kernel(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    branch_x_ptr,
    branch_w_ptr,
    shared_ptr,
    shared_rows_ptr,
    out_ptr,
    rows,
    columns,
    x_stride,
    w_stride,
    DEPTH: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Compute one tile [ROWS, COLUMNS] of the result, BLOCK in features at a time."""
    # Programs that run together share a few tiles of rows and walk over the columns.
    program = tl.program_id(0)
    row_tiles = tl.cdiv(rows, ROWS)
    group_size = GROUP * tl.cdiv(columns, COLUMNS)
    first = program // group_size * GROUP
    tall = tl.minimum(row_tiles - first, GROUP)
    row_at = (first + program % group_size % tall) * ROWS + tl.arange(0, ROWS)
    column_at = program % group_size // tall * COLUMNS + tl.arange(0, COLUMNS)
    # Beyond the edge the first row is read again, which needs no mask in the loop; the result is not written.
    x_row = tl.where(row_at < rows, row_at, 0).to(tl.int64)
    w_row = tl.where(column_at < columns, column_at, 0).to(tl.int64)
    x_rows = x_ptr + (x_row * x_stride)[:, None]
    w_rows = w_ptr + (w_row * w_stride)[:, None]

    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.int32)
    for start in range(0, DEPTH, BLOCK):
        x = _load_rows(x_rows, start, DEPTH, BLOCK)  # codes of 0 beyond the end: what w has there makes no difference
        if PACKED:
            packed = _load_rows(w_rows, start // 2, (DEPTH + 1) // 2, BLOCK // 2)
            w = _spread_nibbles(packed, COLUMNS, BLOCK // 2)
        else:
            w = _load_rows(w_rows, start, DEPTH, BLOCK)
        sums = tl.dot(x, tl.trans(w), sums, out_dtype=tl.int32)

    total = sums.to(tl.float32) * tl.load(w_scale_ptr + w_row)[None, :] * tl.load(x_scale_ptr + x_row)[:, None]
    if HAS_BIAS:
        total += tl.load(bias_ptr + w_row).to(tl.float32)[None, :]
    valid = (row_at < rows)[:, None] & (column_at < columns)[None, :]
    if RANK > 0:
        rank = tl.arange(0, RANK_BLOCK)[None, :]
        branch_x = tl.load(branch_x_ptr + x_row[:, None] * RANK + rank, mask=rank < RANK, other=0.0)
        branch_w = tl.load(branch_w_ptr + w_row[:, None] * RANK + rank, mask=rank < RANK, other=0.0).to(tl.float32)
        total += matrix_product(branch_x, tl.trans(branch_w), PRECISION, INTERPRET)
    if HAS_SHARED:
        shared_row = tl.load(shared_rows_ptr + x_row).to(tl.int64)
        total += tl.load(shared_ptr + shared_row[:, None] * columns + w_row[None, :])
    out_at = row_at.to(tl.int64)[:, None] * columns + column_at[None, :]
    tl.store(out_ptr + out_at, total.to(out_ptr.dtype.element_ty), mask=valid)
