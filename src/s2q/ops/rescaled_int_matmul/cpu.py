"""Rescaled integer product on the CPU: rows in chunks, whose sums stay in the same two buffers and in the caches.

Fresh memory for the sums of every chunk would cost about as much as the products (the operating system hands it out
page by page). The products are those of `int_matmul`; rescaling may fuse a multiplication with an addition, so that
fp32 results differ from the reference in the last bit.

Shapes: `M` tokens, `K` in features, `O` out features, `P` packed bytes of a row (`core.packing`).
"""

import torch
from torch import Tensor

from s2q.core.packing import unpack_codes
from s2q.ops.int_matmul import cpu, int_matmul
from s2q.ops.rescaled_int_matmul import reference

ROWS = 512
"""Rows of a product: fewer cost speed there, more leave the caches."""

EPILOGUE_ROWS = 64
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
        w_codes: int8 [O, K], or uint8 [O, P]; these are unpacked once a call, which keeps nothing.
        w_scale: fp32 [O]; [O, G] is left to the reference.
        bias: [O], floating, or None.
        addend: fp32 [M, O], or None.
        x_bits: Width of the codes of x.
        w_bits: Width of the codes of w.
        out_dtype: Floating, of the result.

    Returns:
        [M, O] in out_dtype.
    """
    if w_codes.dtype == torch.uint8:
        w_codes = unpack_codes(w_codes, num_bits=w_bits, in_features=x_codes.shape[1])
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
    rows, columns = x_codes.shape[0], w_codes.shape[0]
    out = torch.empty(rows, columns, dtype=out_dtype)
    sums = torch.empty(min(rows, ROWS), columns, dtype=torch.int32)
    total = torch.empty(min(rows, EPILOGUE_ROWS), columns)
    offset = torch.zeros(columns) if bias is None else bias.float()
    for start in range(0, rows, ROWS):
        stop = min(start + ROWS, rows)
        x_own = x_codes[start:stop]
        if cpu.IS_AVAILABLE:
            products = torch._int_mm(x_own, w_codes.t(), out=sums[: stop - start])
        else:
            products = int_matmul(x_own, w_codes, x_bits=x_bits, w_bits=w_bits)
        for first in range(start, stop, EPILOGUE_ROWS):
            part = slice(first, min(first + EPILOGUE_ROWS, stop))
            own = total[: part.stop - first]
            torch.mul(products[first - start : part.stop - start], w_scale, out=own)
            torch.addcmul(offset, own, x_scale[part], out=own)
            if addend is not None:
                own.add_(addend[part])
            out[part] = own
    return out
