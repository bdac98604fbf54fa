"""Rescaled integer product on the CPU: in pieces whose codes and sums stay in the same buffers and in the caches.

Fresh memory for the sums of every piece would cost about as much as the products (the operating system hands it out
page by page). The products are those of `int_matmul`; rescaling may fuse a multiplication with an addition, so that
fp32 results differ from the reference in the last bit.

Shapes: `M` tokens, `K` in features, `O` out features, `P` packed bytes of a row (`core.packing`).
"""

import torch
from torch import Tensor

from s2q.core.packing import unpack_codes
from s2q.ops.int_matmul import cpu, int_matmul
from s2q.ops.rescaled_int_matmul import reference

ROWS, COLUMNS = 1024, 1536
"""Rows and out features of a product: its codes of w and its sums are a few MiB."""

EPILOGUE_ROWS = 128
"""Rows that are rescaled at a time: several passes over them find them in the cache."""


def rescaled_int_matmul(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    *,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    x_bits: int = 8,
    w_bits: int = 8,
    out_dtype: torch.dtype,
) -> Tensor:
    """Multiply codes and rescale the sums; see `reference.rescaled_int_matmul`.

    Args:
        x_codes: int8 [M, K].
        x_scale: fp32 [M, 1].
        w_codes: int8 [O, K], or uint8 [O, P]; these are unpacked piece by piece, and nothing is kept.
        w_scale: fp32 [O]; [O, G] is left to the reference.
        bias: [O], floating, or None.
        addend: fp32 [M, O], or None.
        x_bits: Width of the codes of x.
        w_bits: Width of the codes of w.
        out_dtype: Floating, of the result.

    Returns:
        [M, O] in out_dtype.
    """
    if w_scale.ndim != 1:
        return reference.rescaled_int_matmul(
            x_codes,
            x_scale,
            w_codes,
            w_scale,
            bias=bias,
            addend=addend,
            x_bits=x_bits,
            w_bits=w_bits,
            out_dtype=out_dtype,
        )
    rows, columns, depth = x_codes.shape[0], w_codes.shape[0], x_codes.shape[1]
    out = torch.empty(rows, columns, dtype=out_dtype)
    offset = torch.zeros(columns) if bias is None else bias.float()
    total = torch.empty(min(rows, EPILOGUE_ROWS), min(columns, COLUMNS))
    for left in range(0, columns, COLUMNS):
        wide = slice(left, min(left + COLUMNS, columns))
        w_own = w_codes[wide]
        if w_own.dtype == torch.uint8:
            w_own = unpack_codes(w_own, num_bits=w_bits, in_features=depth)
        buffer = torch.empty(min(rows, ROWS), len(w_own), dtype=torch.int32)
        for start in range(0, rows, ROWS):
            stop = min(start + ROWS, rows)
            sums = _products(x_codes[start:stop], w_own, buffer[: stop - start], x_bits=x_bits, w_bits=w_bits)
            for first in range(start, stop, EPILOGUE_ROWS):
                part = slice(first, min(first + EPILOGUE_ROWS, stop))
                own = total[: part.stop - first, : len(w_own)]
                torch.mul(sums[first - start : part.stop - start], w_scale[wide], out=own)
                torch.addcmul(offset[wide], own, x_scale[part], out=own)
                if addend is not None:
                    own.add_(addend[part, wide])
                out[part, wide] = own
    return out


def _products(x_codes: Tensor, w_codes: Tensor, buffer: Tensor, *, x_bits: int, w_bits: int) -> Tensor:
    if cpu.IS_AVAILABLE:
        return torch._int_mm(x_codes, w_codes.t(), out=buffer)
    return int_matmul(x_codes, w_codes, x_bits=x_bits, w_bits=w_bits)
