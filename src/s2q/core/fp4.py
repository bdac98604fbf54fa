"""Block formats of 4-bit floating point: levels of E2M1 with an 8-bit floating-point scale for each group.

    x ≈ l · s · Δ,    l ∈ ±{0, 0.5, 1, 1.5, 2, 3, 4, 6}

| format | group | s | Δ |
| --- | --- | --- | --- |
| nvfp4 | 16 | E4M3, nearest to max|group| / (6 Δ) | fp32, max|row| / (6 · 448), of a weight's row or a token |
| mxfp4 | 32 | a power of two, 2^(⌊log2 max|group|⌋ - 2) | 1 |

NVIDIA's NVFP4 has one Δ for a tensor; one for a row takes the same product, since it scales a row of the result. The Δ
of a weight is rounded to four significant bits, so that bfloat16, in which s · Δ is stored, has it exactly. MXFP4
is that of the OCP Microscaling Formats specification 1.0, whose values above 6 s become 6 s.

Example, mxfp4: the largest magnitude of a group is 7, so s = 2^(2 - 2) = 1; 7 becomes 6, 2.6 becomes 3, 0.2 becomes 0.

Shapes: `R` rows, `G` groups.
"""

from typing import Any

import torch
from torch import Tensor

from s2q.core.schemes import NVFP4, QuantScheme

E2M1_LEVELS = (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the codes -8 to 7; two are 0, as in E2M1."""

LARGEST_SCALE = 448.0
"""Of E4M3."""

_LARGEST, _EXPONENT = 6.0, 2  # of E2M1
_EXPONENTS = (-127, 127)  # of a scale that is a power of two


def exact_in_bf16(amax: Tensor) -> Tensor:
    """Move the largest magnitude of each row, fp32 [..., G], so that Δ of NVFP4 has four significant bits.

    As s has four too, bfloat16 has s · Δ exactly, and s is still known from it. The gradient passes straight through.
    """
    amax = amax.float()
    row = amax.detach().amax(dim=-1, keepdim=True)
    largest = round_row_scale(row / (_LARGEST * LARGEST_SCALE)) * (_LARGEST * LARGEST_SCALE)
    moved: Tensor = _Rounded.apply(amax, torch.where(amax == row, largest, torch.minimum(amax, largest)))  # type: ignore[no-untyped-call]
    return moved


def round_row_scale(row: Tensor) -> Tensor:
    """Round Δ of NVFP4, fp32 of any shape, to four significant bits; the gradient passes straight through."""
    mantissa, exponent = torch.frexp(row.detach())
    rounded: Tensor = _Rounded.apply(row, torch.ldexp((mantissa * 16).round() / 16, exponent))  # type: ignore[no-untyped-call]
    return rounded


def block_scale(amax: Tensor, scheme: QuantScheme) -> Tensor:
    """Turn the largest magnitude of each group, [..., G], into s · Δ, fp32 of that shape.

    It is 0 where the group is, or underflows. The gradient towards `amax` passes straight through the rounding of s.
    """
    amax = amax.float()
    if scheme.levels == NVFP4:
        row = amax.detach().amax(dim=-1, keepdim=True) / (_LARGEST * LARGEST_SCALE)
        exact = amax / _LARGEST
        group = (exact.detach() / torch.where(row == 0, torch.ones_like(row), row)).to(torch.float8_e4m3fn)
        rounded = group.float() * row
    else:
        exact = amax / _LARGEST
        _, exponent = torch.frexp(amax.detach())  # amax = m · 2^exponent, 1/2 <= m < 1
        exponent = (exponent - 1 - _EXPONENT).clamp(*_EXPONENTS)
        rounded = torch.where(amax == 0, torch.zeros_like(exact), torch.ldexp(torch.ones_like(exact), exponent))
    scale: Tensor = _Rounded.apply(exact, rounded)  # type: ignore[no-untyped-call]
    return scale


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exact: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None
