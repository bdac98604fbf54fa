"""The path of an activation into an integer product, the specification.

    x₁ = (x - shift) ⊙ v,    c = x₁ · V,    y = (x₁ - c · Vᵀ) · (A ⊗ B),    codes, Δ = quantize_per_token(y)

With means (`core.cubes`), a token's codes are those of y less the dequantized mean of its cube.

Each part may be missing; further ones (`InputPart.apply`) act on y. The coefficients c belong to the low-rank branch,
which multiplies them in floating point; where it is taken from the weight, x₁ is not deflated: y = x₁ · (A ⊗ B).

Precision. Everything is fp32, except that the products with V, A and B of a bf16 x take and give bf16, summed in fp32,
as every other product of such a model does. x₁, V, A, B and what each product gives are rounded to it, which puts an
error of about 0.004 of its root mean square on y. Codes of 8 bits put 0.008 on it, of 6 bits 0.034, of 4 bits 0.15.

Shapes: `M` tokens, `I` features, `n1`, `n2` orders of A (left) and B (right), `r` rank, `N` bits.
"""

import torch
from torch import Tensor

from s2q.common.torch_state import without_autocast
from s2q.core.cubes import QuantizedMeans
from s2q.core.input_path import InputTensors
from s2q.core.qparams import quantize_per_token
from s2q.ops.kronecker import scaled_kronecker


def activation_path(
    x: Tensor, path: InputTensors, *, num_bits: int, means: QuantizedMeans | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Transform and quantize the input of a linear.

    Args:
        x: [M, I], floating.
        num_bits: N, 2 to 8.
        means: Of the cubes of the tokens, to be subtracted from y; None for zero.

    Returns:
        codes: int8 [M, I].
        token_scale: fp32 [M, 1]; an all-zero token has scale 1 and codes 0, a token with a NaN has scale NaN.
        coefficients: c, fp32 [M, r]; None without a basis.
    """
    transformed, coefficients = transform_input(x, path)
    if means is not None:
        transformed = means.difference(transformed)
    codes, token_scale = quantize_per_token(transformed, num_bits=num_bits, clip_ratio=path.clip_ratio)
    return codes, token_scale, coefficients


@without_autocast
def transform_input(x: Tensor, path: InputTensors) -> tuple[Tensor, Tensor | None]:
    """Carry out all of the path except the quantization.

    Args:
        x: [..., I], floating.

    Returns:
        y: [..., I]; the dtype of x where nothing is done to it and, if it is bf16, after a product; otherwise fp32.
        coefficients: c, fp32 [..., r]; None without a basis.
    """
    y, coefficients = _transformed(x, path)
    return apply_steps(y, path, coefficients) if path.steps else (y, coefficients)


def apply_steps(y: Tensor, path: InputTensors, coefficients: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Apply the parts that no backend computes; their coefficients follow those of the low-rank branch.

    Args:
        y: [..., I], transformed.
        coefficients: [..., r] or None.
    """
    columns = [] if coefficients is None else [coefficients]
    for part, tensors in path.steps:
        assert part.apply is not None
        y, further = part.apply(y, *tensors)
        columns += [] if further is None else [further.float()]
    return y, torch.cat(columns, dim=-1) if columns else None


def _transformed(x: Tensor, path: InputTensors) -> tuple[Tensor, Tensor | None]:
    if path.low_rank_basis is not None and not path.deflates:
        y, _ = _transformed(x, path._replace(low_rank_basis=None))
        return y, _low_rank_coefficients(x, path)
    if path.left is None and path.right is None and path.low_rank_basis is None:
        return scaled_kronecker(x if path.shift is None else x.float() - path.shift, scale=path.scale), None
    dtype = product_dtype(x)
    x, coefficients = _split_low_rank(x, path)
    left, right = (None if factor is None else factor.to(dtype) for factor in (path.left, path.right))
    return scaled_kronecker(x, left=left, right=right), coefficients


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the products with V, A and B: bf16 for a bf16 x, fp32 or wider for others."""
    return x.dtype if x.dtype == torch.bfloat16 else torch.promote_types(x.dtype, torch.float32)


def _split_low_rank(x: Tensor, path: InputTensors) -> tuple[Tensor, Tensor | None]:
    """Shift and scale x [..., I] and subtract what the low-rank basis spans.

    Returns:
        rest: [..., I] in the dtype of products.
        coefficients: fp32 [..., r], or None without a basis.
    """
    dtype = product_dtype(x)
    scaled = scaled_kronecker(x if path.shift is None else x.float() - path.shift, scale=path.scale).to(dtype)
    if path.low_rank_basis is None:
        return scaled, None
    rows, basis = scaled.reshape(-1, scaled.shape[-1]), path.low_rank_basis.to(dtype)
    coefficients = rows @ basis
    rest = torch.addmm(rows, coefficients, basis.t(), alpha=-1)  # rounded once, after the difference
    return rest.reshape(scaled.shape), coefficients.float().reshape(*scaled.shape[:-1], basis.shape[1])


def _low_rank_coefficients(x: Tensor, path: InputTensors) -> Tensor:
    """Shift and scale x [..., I] and return its coefficients in the low-rank basis, fp32 [..., r]."""
    assert path.low_rank_basis is not None
    scaled, _ = _split_low_rank(x, path._replace(low_rank_basis=None))
    return (scaled @ path.low_rank_basis.to(scaled.dtype)).float()
