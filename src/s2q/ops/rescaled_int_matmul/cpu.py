"""Rescaled integer product on the CPU: rows in chunks, whose int32 and fp32 sums stay in the same two buffers.

Fresh memory for the sums of every chunk would cost about as much as the products (the operating system hands it out
page by page), and the sums of a whole video would leave the caches. The products are those of `int_matmul`; the result
is that of the reference, bit for bit.

Shapes: `M` tokens, `K` in features, `O` out features, `P` packed bytes of a row (`core.packing`).
"""

import torch
from torch import Tensor

from s2q.core.packing import unpack_codes
from s2q.ops.int_matmul import cpu, int_matmul
from s2q.ops.rescaled_int_matmul import reference

ROWS = 512
"""Rows of a chunk: 256 to 1024 are about as fast."""


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
    chunk = min(rows, ROWS)
    sums, total = torch.empty(chunk, columns, dtype=torch.int32), torch.empty(chunk, columns)
    offset = None if bias is None else bias.float()
    for start in range(0, rows, ROWS):
        stop = min(start + ROWS, rows)
        own, x_own = total[: stop - start], x_codes[start:stop]
        if cpu.IS_AVAILABLE:
            products = torch._int_mm(x_own, w_codes.t(), out=sums[: stop - start])
        else:
            products = int_matmul(x_own, w_codes, x_bits=x_bits, w_bits=w_bits)
        torch.mul(products, w_scale, out=own).mul_(x_scale[start:stop])
        if offset is not None:
            own.add_(offset)
        if addend is not None:
            own.add_(addend[start:stop])
        out[start:stop] = own
    return out
