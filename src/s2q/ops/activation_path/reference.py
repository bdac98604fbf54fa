"""The path of an activation into an integer product, the specification.

    x₁ = (x - shift) ⊙ v,    c = x₁ · V,    y = (x₁ - c · Vᵀ) · (A ⊗ B),    codes, Δ = quantize_per_token(y)

Each part may be missing. The coefficients c belong to the low-rank branch, which multiplies them in floating point;
where it is taken from the weight, x₁ is not deflated: y = x₁ · (A ⊗ B), as without a branch.

Precision. Everything is fp32, except that the products with V, A and B of a bf16 x take and give bf16, summed in fp32,
as every other product of such a model does. x₁, V, A, B and what each product gives are rounded to it, which puts an
error of about 0.004 of its root mean square on y. Codes of 8 bits put 0.008 on it, of 6 bits 0.034, of 4 bits 0.15.

Shapes: `M` tokens, `I` features, `n1`, `n2` orders of A (left) and B (right), `r` rank, `N` bits.
"""

import torch
from torch import Tensor

from s2q.common.torch_state import without_autocast
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
    deflates: bool = True,
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
        deflates: Whether c · Vᵀ is taken out of what is quantized.
        clip_ratio: Factor in (0, 1] on a token's largest magnitude: a float, or a tensor that broadcasts to [M, 1].

    Returns:
        codes: int8 [M, I].
        token_scale: fp32 [M, 1]; an all-zero token has scale 1 and codes 0, a token with a NaN has scale NaN.
        coefficients: c, fp32 [M, r]; None without a basis.
    """
    transformed, coefficients = transform_input(
        x, shift=shift, scale=scale, left=left, right=right, low_rank_basis=low_rank_basis, deflates=deflates
    )
    codes, token_scale = quantize_per_token(transformed, num_bits=num_bits, clip_ratio=clip_ratio)
    return codes, token_scale, coefficients


@without_autocast
def transform_input(
    x: Tensor,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    left: Tensor | None = None,
    right: Tensor | None = None,
    low_rank_basis: Tensor | None = None,
    deflates: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Carry out all of the path but the quantization.

    Args:
        x: [..., I], floating; the other arguments are those of `activation_path`.
        shift: [I] or None.
        scale: [I] or None.
        left: [n1, n1] or None.
        right: [n2, n2] or None.
        low_rank_basis: [I, r] or None.
        deflates: Whether c · Vᵀ is taken out of y.

    Returns:
        y: [..., I]; the dtype of x where nothing is done to it and, if it is bf16, after a product; otherwise fp32.
        coefficients: c, fp32 [..., r]; None without a basis.
    """
    if low_rank_basis is not None and not deflates:
        y, _ = transform_input(x, shift=shift, scale=scale, left=left, right=right)
        return y, low_rank_coefficients(x, shift=shift, scale=scale, basis=low_rank_basis)
    if left is None and right is None and low_rank_basis is None:
        return scaled_kronecker(x if shift is None else x.float() - shift, scale=scale), None
    dtype = product_dtype(x)
    x, coefficients = split_low_rank(x, shift=shift, scale=scale, basis=low_rank_basis)
    left, right = (None if factor is None else factor.to(dtype) for factor in (left, right))
    return scaled_kronecker(x, left=left, right=right), coefficients


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the products with V, A and B: bf16 for a bf16 x, fp32 or wider for others."""
    return x.dtype if x.dtype == torch.bfloat16 else torch.promote_types(x.dtype, torch.float32)


def split_low_rank(
    x: Tensor, *, shift: Tensor | None = None, scale: Tensor | None = None, basis: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Shift and scale x and take out what a few directions hold.

    Args:
        x: [..., I], floating.
        shift: [I] or None.
        scale: [I] or None.
        basis: V, [I, r], or None.

    Returns:
        rest: [..., I] in the dtype of products.
        coefficients: fp32 [..., r], or None without a basis.
    """
    dtype = product_dtype(x)
    scaled = scaled_kronecker(x if shift is None else x.float() - shift, scale=scale).to(dtype)
    if basis is None:
        return scaled, None
    rows, basis = scaled.reshape(-1, scaled.shape[-1]), basis.to(dtype)
    coefficients = rows @ basis
    rest = torch.addmm(rows, coefficients, basis.t(), alpha=-1)  # rounded once, after the difference
    return rest.reshape(scaled.shape), coefficients.float().reshape(*scaled.shape[:-1], basis.shape[1])


def low_rank_coefficients(
    x: Tensor, *, shift: Tensor | None = None, scale: Tensor | None = None, basis: Tensor
) -> Tensor:
    """Shift and scale x and return what a few directions hold of it.

    Args:
        x: [..., I], floating.
        shift: [I] or None.
        scale: [I] or None.
        basis: V, [I, r].

    Returns:
        c, fp32 [..., r].
    """
    scaled, _ = split_low_rank(x, shift=shift, scale=scale)
    return (scaled @ basis.to(scaled.dtype)).float()
