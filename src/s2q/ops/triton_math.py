"""Helpers of the Triton kernels; imports triton, so only modules named `triton` may import this one.

The interpreter differs from a GPU in two ways that the kernels have to know: its products of bf16 matrices multiply
the bits as whole numbers, so that operands are converted to fp32 there (`INTERPRETING`, a compile-time constant of
every kernel with products); and its conversion from fp32 to bf16 truncates.
"""

import triton
import triton.language as tl
from triton import knobs

INTERPRETING: bool = bool(knobs.runtime.interpret)
"""Whether the kernels of this process run on the CPU; fixed when they are defined."""


@triton.jit
def round_to_even(x):
    """Round fp32 half to even, for |x| ≤ 2^22: 1.5 · 2^23 leaves no room for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def magnitude_bits(x):
    """Bits of |x|, x in fp32, as int32: ordered like |x|, with NaN above infinity, so that a maximum keeps it."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def matrix_product(a, b, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """Product of two matrices, summed in fp32.

    PRECISION is "native" for unconverted operands (bf16, fp16), "bf16" to round them to it first, "tf32" for
    fp32 truncated to 11 bits by the tensor cores, or "tf32x3" for fp32 in three products of such parts.
    """
    if PRECISION == "bf16":
        a, b = a.to(tl.bfloat16), b.to(tl.bfloat16)
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    elif PRECISION == "bf16" or PRECISION == "native":
        return tl.dot(a, b)
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def quantization_scale(amax_bits, clip_ratio, QMAX: tl.constexpr):
    """Δ = clip_ratio · amax / QMAX in IEEE arithmetic, 1 where that is 0; see `core.qparams.scale_from_amax`."""
    scale = tl.div_rn(amax_bits.to(tl.float32, bitcast=True) * clip_ratio, QMAX * 1.0)
    return tl.where(scale == 0.0, 1.0, scale)


@triton.jit
def quantize(x, scale, QMAX: tl.constexpr):
    """Codes of fp32 x, int8: clamped before they are rounded, which is the same and bounds what is rounded."""
    steps = tl.div_rn(x, scale)
    steps = tl.minimum(tl.maximum(steps, -QMAX - 1.0), QMAX * 1.0)
    return round_to_even(steps).to(tl.int8)
