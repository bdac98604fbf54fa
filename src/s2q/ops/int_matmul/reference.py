"""Integer matrix product, the specification: y = x · wᵀ in integers.

Stock PyTorch has no fast integer GEMM on every device, but fp32 holds every whole number up to 2^24 exactly. A sum of K
products of an N-bit and an M-bit code is at most K · 2^(N-1) · 2^(M-1), so that an fp32 GEMM over at most
2^24 / 2^(N+M-2) terms is exact in whatever order it adds. Longer sums are cut into such pieces and added in int32.

Shapes: `M` rows (tokens), `K` in features, `O` out features.
"""

import torch
from torch import Tensor


def int_matmul(x_codes: Tensor, w_codes: Tensor, *, x_bits: int = 8, w_bits: int = 8) -> Tensor:
    """Multiply codes int8 [M, K] and int8 [O, K], bit-equal to the product in int64; int32 [M, O].

    Fewer bits, at most 8 each, allow longer fp32 pieces (faster), not another result. The sum must fit in int32, which
    it does up to K = 131071 at 8 bits each.
    """
    assert x_codes.dtype == w_codes.dtype == torch.int8, (x_codes.dtype, w_codes.dtype)
    piece = exact_terms(x_bits=x_bits, w_bits=w_bits)
    in_features = x_codes.shape[1]
    if in_features <= piece:
        return _fp32_matmul(x_codes, w_codes)
    total = _fp32_matmul(x_codes[:, :piece], w_codes[:, :piece])
    for start in range(piece, in_features, piece):
        total += _fp32_matmul(x_codes[:, start : start + piece], w_codes[:, start : start + piece])
    return total


def exact_terms(*, x_bits: int, w_bits: int) -> int:
    """Return how many products of codes of these widths fp32 adds exactly."""
    return (1 << 24) >> (x_bits + w_bits - 2)


def _fp32_matmul(x_codes: Tensor, w_codes: Tensor) -> Tensor:
    # Reduced precision inside the GEMM (TF32, bf16) does no harm: 8-bit codes are exact in both, and both add in fp32.
    return (x_codes.float() @ w_codes.float().t()).to(torch.int32)
