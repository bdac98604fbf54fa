"""Integer matrix product on the CPU through oneDNN, exact and several times faster than an fp32 GEMM.

With AVX-512 VNNI, `torch._int_mm` adds products of codes in 32 bits. AVX2 and AVX-512 without VNNI add each two of them
in 16 bits, where 8-bit codes saturate:

    |u₁ w₁ + u₂ w₂| ≤ 2 · (2^N - 1) · 2^(M-1) < 2^15        if N + M ≤ 15

with the N-bit code of x as u = x + 2^(N-1) (its zero point), not negative, and the M-bit code of w. So every 4-bit
weight is multiplied exactly with inputs of up to 8 bits, by `onednn.qlinear_pointwise`. Otherwise the reference
multiplies in fp32: 8-bit weights with 8-bit inputs, for example (two products of 4-bit halves take as long).

Example: 2 · 255 · 8 = 4080 for 8-bit inputs and 4-bit weights; 2 · 255 · 128 = 65280 for 8-bit weights saturates.

Shapes: `M` rows (tokens), `K` in features, `O` out features.
"""

import torch
from torch import Tensor

from s2q.common.processor import features, has_int8_dot
from s2q.ops.int_matmul import reference

_PAIR_BITS = 15
"""Bits of two codes together up to which a pair of products fits in 16 bits."""


def adds_in_32_bits() -> bool:
    """Whether `torch._int_mm` is fast and exact for all codes."""
    return bool(torch._C._has_mkldnn) and has_int8_dot()


def adds_pairs(*, x_bits: int, w_bits: int) -> bool:
    """Tell whether `multiply_pairs` is available and exact for codes of these widths."""
    is_there = bool(torch._C._has_mkldnn) and "avx2" in features() and hasattr(torch.ops.onednn, "qlinear_pointwise")
    return is_there and x_bits + w_bits <= _PAIR_BITS


def multiplies_pairs(*, x_bits: int, w_bits: int) -> bool:
    """Tell whether `multiply_pairs` is the fastest exact product for codes of these widths."""
    return not adds_in_32_bits() and adds_pairs(x_bits=x_bits, w_bits=w_bits)


def is_fast(*, x_bits: int, w_bits: int) -> bool:
    """Tell whether products of codes of these widths are faster here than fp32."""
    return adds_in_32_bits() or adds_pairs(x_bits=x_bits, w_bits=w_bits)


def int_matmul(x_codes: Tensor, w_codes: Tensor, *, x_bits: int = 8, w_bits: int = 8) -> Tensor:
    """Multiply codes on the CPU, bit-equal to the reference; the widths decide how, where there is no VNNI."""
    if adds_in_32_bits():
        return torch._int_mm(x_codes, w_codes.t())
    fits = x_codes.shape[1] <= reference.exact_terms(x_bits=x_bits, w_bits=w_bits)  # the sums come in fp32
    if not fits or not adds_pairs(x_bits=x_bits, w_bits=w_bits):
        return reference.int_matmul(x_codes, w_codes, x_bits=x_bits, w_bits=w_bits)
    if not x_codes.numel() or not w_codes.numel():
        return torch.zeros(len(x_codes), len(w_codes), dtype=torch.int32, device="cpu")
    scale = torch.ones(len(w_codes), dtype=torch.float32, device="cpu")
    return multiply_pairs(offset_codes(x_codes, num_bits=x_bits), prepack(w_codes), scale, x_bits=x_bits).to(
        torch.int32
    )


def offset_codes(x_codes: Tensor, *, num_bits: int) -> Tensor:
    """Return codes [M, K] plus their zero point, uint8: those of `multiply_pairs`."""
    return (x_codes.view(torch.uint8) + (1 << (num_bits - 1))).contiguous()  # modulo 256


def prepack(w_codes: Tensor) -> Tensor:
    """Return the codes of a weight, int8 [O, K], in the order in which oneDNN reads them, at the same size."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack(w_codes.contiguous(), None)  # it does not look at strides
    return packed


def multiply_pairs(x_offset: Tensor, w_packed: Tensor, w_scale: Tensor, *, x_bits: int) -> Tensor:
    """Multiply codes and scale the sums, (x · wᵀ) · Δ_w, fp32 [M, O], each sum converted first; see `adds_pairs`.

    x is uint8 [M, K] from `offset_codes`, w comes from `prepack`, Δ_w is fp32 [O].
    """
    zeros = torch.zeros(len(w_scale), dtype=torch.int32, device="cpu")
    point = 1 << (x_bits - 1)
    scaled: Tensor = torch.ops.onednn.qlinear_pointwise(
        x_offset, 1.0, point, w_packed, w_scale.contiguous(), zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return scaled
