"""Rescaled integer product on the CPU: in pieces whose codes and sums stay in the same buffers and in the caches.

The products are those of `int_matmul`, and the rescaling is the reference's: results are bit-equal. It takes one pass
over the sums where a C compiler is (`ops.fused`), and with AVX-512 the same pass adds a low-rank branch, with
AVX512-BF16 in half the time where its numbers are in bf16. Codes are unpacked, offset and prepacked in the call, which
takes a fortieth of the products' time for 2048 rows; small layers bring their weight prepacked (`nn.dequantized`).

Shapes: `M` tokens, `K` in features, `O` out features, `P` packed bytes of a row (`core.packing`).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from s2q.core.packing import check_packed, unpack_codes
from s2q.ops.fused import passes
from s2q.ops.int_matmul import cpu, int_matmul
from s2q.ops.level_values.cpu import level_values
from s2q.ops.passes import DTYPES, PANEL, RANKS, SEGMENT, SMALLEST_BRANCH, Passes, vector
from s2q.ops.scratch import take

ROWS, COLUMNS = 4096, PANEL
"""Rows and out features of a product, at most: its sums take up to 32 MiB."""

UNPACKED_CODES = 1 << 20
"""Codes of w that are unpacked at a time."""

EPILOGUE_ROWS = 256
"""Rows that are rescaled at a time: several passes over them find them in the cache."""


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
    levels: Tensor | None = None,
    group_scale: Tensor | None = None,
    x_bits: int = 8,
    w_bits: int = 8,
    out_dtype: torch.dtype,
) -> Tensor:
    """Multiply codes and rescale the sums, with w_scale [O]; see `reference.rescaled_int_matmul`.

    Packed codes uint8 [O, P] are unpacked, or looked up in levels, piece by piece, and nothing is kept. If
    `multiplies_pairs`, w may also be [K, O] from `int_matmul.cpu.prepack`.
    """
    columns, rows = w_scale.shape[0], len(x_codes)
    out = torch.empty(rows, columns, dtype=out_dtype, device="cpu")
    branch = None if low_rank_weight is None else low_rank_weight.float().contiguous()
    offset = None if bias is None else bias.float()
    pairs, direct = cpu.multiplies_pairs(x_bits=x_bits, w_bits=w_bits), branch is None and shared_output is None
    fused = None if pairs or (direct and out_dtype not in DTYPES) else passes()
    joins = fused is not None and fused.adds_branches and shared_output is None and out_dtype in DTYPES
    join = None
    if low_rank_input is not None and branch is not None:
        low_rank_input = low_rank_input.contiguous()
        if fused is not None and joins and _is_joined(low_rank_input, branch, rows=rows, columns=columns):
            join = _joiner(fused, low_rank_input, branch)
    if fused is not None:  # -0 changes nothing, not even the sign of zero
        offset, x_scale = vector(bias, columns, missing=-0.0), vector(x_scale, rows, missing=1.0)
        w_scale = vector(w_scale, columns, missing=1.0)
    if pairs:
        x_codes = cpu.offset_codes(x_codes, num_bits=x_bits)
    width, height = columns if w_codes.is_mkldnn else _even_size(columns, COLUMNS), _even_size(rows, ROWS)
    for left in range(0, columns, width):
        wide = slice(left, min(left + width, columns))
        looked_up = None if levels is None else (levels, None if group_scale is None else group_scale[wide])
        w_piece = w_codes
        if not w_codes.is_mkldnn:
            w_piece = _prepared(w_codes[wide], x_codes.shape[1], levels=looked_up, w_bits=w_bits, pairs=pairs)
        joined = None if join is None else join(wide)
        for start in range(0, rows, height):
            x_piece = x_codes[start : start + height]
            if pairs:
                sums = cpu.multiply_pairs(x_piece, w_piece, w_scale[wide], x_bits=x_bits)
            else:
                sums = _products(x_piece, w_piece, x_bits=x_bits, w_bits=w_bits)
            step = max(EPILOGUE_ROWS, EPILOGUE_ROWS * COLUMNS // max(1, sums.shape[1]))
            for first in range(0, len(x_piece), step):
                total = sums[first : first + step]
                part = slice(start + first, start + first + len(total))
                scales = None if pairs else w_scale[wide], x_scale[part], None if offset is None else offset[wide]
                if direct or joined is not None:
                    added = None if joined is None else (joined[0][part], joined[1])
                    _rescale(total, *scales, branch=added, out=out[part, wide], fused=fused)
                    continue
                wider = take("rescaled sums", tuple(total.shape), torch.float32)
                _rescale(total, *scales, out=wider, fused=fused)
                if low_rank_input is not None and branch is not None:
                    wider.addmm_(low_rank_input[part], branch[wide].t())
                if shared_output is not None and shared_rows is not None:
                    wider += shared_output[:, wide].index_select(0, shared_rows[part])
                out[part, wide] = wider
    return out


def _rescale(
    sums: Tensor,
    w_scale: Tensor | None,
    x_scale: Tensor,
    bias: Tensor | None,
    *,
    branch: tuple[Tensor, Tensor] | None = None,
    out: Tensor,
    fused: Passes | None,
) -> None:
    """Write int32 sums [M, O], or fp32 ones that have their w_scale (None), rescaled as the reference does to `out`."""
    if fused is not None:
        assert w_scale is not None
        assert bias is not None
        fused.rescale(sums, w_scale, x_scale, bias, branch=branch, out=out)
        return
    total = sums
    if w_scale is not None:
        total = take("scaled sums", tuple(sums.shape), torch.float32).copy_(sums).mul_(w_scale)
    target = out if out.dtype == torch.float32 else total
    if bias is None:
        torch.mul(total, x_scale, out=target)
    else:
        torch.addcmul(bias, total, x_scale, out=target)
    if target is total:
        out.copy_(total)


def _is_joined(low_rank_input: Tensor, branch: Tensor, *, rows: int, columns: int) -> bool:
    """Whether `Passes.rescale` adds a low-rank branch with the bits of BLAS; PyTorch adds others, or raises."""
    rank = branch.shape[-1]
    fits = low_rank_input.dtype == torch.float32 and low_rank_input.shape == (rows, rank) and rank in RANKS
    return fits and branch.shape == (columns, rank) and min(rows, columns) >= SMALLEST_BRANCH


def _joiner(fused: Passes, low: Tensor, weight: Tensor) -> Callable[[slice], tuple[Tensor, Tensor]]:
    """Return what makes a branch for `Passes.rescale` of coefficients [M, r] and some rows of a weight [O, r].

    It is in pairs where all numbers are those of bf16.
    """
    low_pairs = fused.reversed_pairs(low, segment=1) if fused.adds_bf16_branches else None

    def join(wide: slice) -> tuple[Tensor, Tensor]:
        pairs = None if low_pairs is None else fused.reversed_pairs(weight[wide], segment=SEGMENT)
        return (low, weight[wide].t().contiguous()) if low_pairs is None or pairs is None else (low_pairs, pairs)

    return join


def _even_size(total: int, most: int) -> int:
    """Return the size of as few pieces as can be, at most `most` each and even."""
    return max(1, math.ceil(total / max(1, math.ceil(total / most))))


def _prepared(
    w_codes: Tensor, in_features: int, *, levels: tuple[Tensor, Tensor | None] | None, w_bits: int, pairs: bool
) -> Tensor:
    """The codes of w as they are multiplied: unpacked or looked up, and prepacked for `multiply_pairs`."""
    if levels is not None:
        values = take("codes", (len(w_codes), in_features), torch.int8)
        w_codes = level_values(levels[0], w_codes, levels[1], in_features=in_features, out=values)
    elif w_codes.dtype == torch.uint8:
        w_codes = _unpacked(w_codes, num_bits=w_bits, in_features=in_features)
    return cpu.prepack(w_codes) if pairs else w_codes


def _unpacked(packed: Tensor, *, num_bits: int, in_features: int) -> Tensor:
    """`unpack_codes` into the same buffer every time, in pieces whose intermediate results stay in the caches."""
    if num_bits > 4:  # nothing to unpack
        return unpack_codes(packed, num_bits=num_bits, in_features=in_features)
    check_packed(packed, num_bits=num_bits, in_features=in_features)
    codes, fused = take("codes", (len(packed), 2 * packed.shape[1]), torch.int8), passes()
    if fused is not None:
        fused.unpack(packed.contiguous(), out=codes)
        return codes[:, :in_features]
    step = max(1, UNPACKED_CODES // max(1, codes.shape[1]))
    for start in range(0, len(packed), step):
        part = slice(start, start + step)
        unpack_codes(packed[part], num_bits=num_bits, in_features=in_features, out=codes[part])
    return codes[:, :in_features]


def _products(x_codes: Tensor, w_codes: Tensor, *, x_bits: int, w_bits: int) -> Tensor:
    if cpu.adds_in_32_bits():
        sums = take("sums", (x_codes.shape[0], w_codes.shape[0]), torch.int32)
        return torch._int_mm(x_codes, w_codes.t(), out=sums)
    return int_matmul(x_codes, w_codes, x_bits=x_bits, w_bits=w_bits)
