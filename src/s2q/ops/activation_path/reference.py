"""The path of an activation into an integer product, the specification.

    x₁ = (x - shift) ⊙ v,    c = x₁ · V,    y = (x₁ - c · Vᵀ) · (A ⊗ B),    codes, Δ = quantize_per_token(y)

Each part may be missing. The coefficients c belong to the low-rank branch, which multiplies them in floating point.

Shapes: `M` tokens, `I` features, `n1`, `n2` orders of A (left) and B (right), `r` rank, `N` bits.
"""

import torch
from torch import Tensor

from s2q.core.qparams import ClipRatio
from s2q.ops.kronecker import scaled_kronecker
from s2q.ops.quantize_per_token import quantize_per_token


def activation_path(
    x: Tensor,
    *,
    num_bits: int,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    left: Tensor | None = None,
    right: Tensor | None = None,
    low_rank_basis: Tensor | None = None,
    clip_ratio: ClipRatio = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Transform and quantize the input of a linear.

    Args:
        x: [M, I], floating.
        num_bits: N, 2 to 8.
        shift: [I], fp32, subtracted first.
        scale: v, [I], fp32.
        left: A, [n1, n1], fp32; None is the 1×1 identity if `right` is given.
        right: B, [n2, n2], fp32; None is the identity that makes n1 · n2 = I.
        low_rank_basis: V, [I, r], floating, with orthonormal columns; computed with in fp32.
        clip_ratio: Factor in (0, 1] on a token's largest magnitude: a float, or a tensor that broadcasts to [M, 1].

    Returns:
        codes: int8 [M, I].
        token_scale: fp32 [M, 1]; an all-zero token has scale 1 and codes 0, a token with a NaN has scale NaN.
        coefficients: c, fp32 [M, r]; None without a basis.
    """
    if shift is not None:
        x = x.float() - shift
    transformed, coefficients = split_low_rank(x, scale=scale, basis=low_rank_basis)
    transformed = scaled_kronecker(
        transformed, scale=None if coefficients is not None else scale, left=left, right=right
    )
    codes, token_scale = quantize_per_token(transformed, num_bits=num_bits, clip_ratio=clip_ratio)
    return codes, token_scale, coefficients


def split_low_rank(x: Tensor, *, scale: Tensor | None, basis: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scale x and take out what a few directions hold; without a basis, leave x as it is, unscaled.

    Args:
        x: [M, I], floating.
        scale: [I] or None.
        basis: V, [I, r], or None.

    Returns:
        rest: [M, I]; fp32 with a basis.
        coefficients: fp32 [M, r], or None without a basis.
    """
    if basis is None:
        return x, None
    basis = basis.to(torch.float32)
    scaled = scaled_kronecker(x.float(), scale=scale)
    coefficients = scaled @ basis
    return scaled - coefficients @ basis.t(), coefficients
