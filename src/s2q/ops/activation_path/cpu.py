"""The activation path on the CPU: the reference's arithmetic in chunks of rows, in buffers that stay in the caches.

Shapes: `M` tokens, `I` features, `n1`, `n2` orders of A (left) and B (right), `r` rank.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from s2q.core.qparams import ClipRatio, code_range, token_scale_from_amax
from s2q.ops.activation_path import reference
from s2q.ops.scratch import take

CHUNK_BYTES = 2 << 20
"""Of x in a chunk; what is computed from it finds room in the caches then."""

MIN_ROWS = {torch.bfloat16: 128}
"""Rows of a chunk by dtype of x, whatever its bytes: below, products of bf16 take longer than the caches save."""

_MAGNITUDES = {
    torch.bfloat16: (torch.int16, 0x7FFF),
    torch.float16: (torch.int16, 0x7FFF),
    torch.float32: (torch.int32, 0x7FFFFFFF),
}
"""Integers of a dtype's width, and all their bits but the sign: magnitudes are in order there, NaN above all."""


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
    """Transform and quantize the input of a linear; see `reference.activation_path`.

    Args:
        x: [M, I], floating; fp64 is left to the reference.
        num_bits: N, 2 to 8.
        shift: fp32 [I] or None.
        scale: fp32 [I] or None.
        left: fp32 [n1, n1] or None.
        right: fp32 [n2, n2] or None.
        low_rank_basis: [I, r] or None.
        deflates: Whether what goes through the branch is taken out of what is quantized.
        clip_ratio: A float, a tensor that broadcasts to [M, 1], or None.

    Returns:
        codes int8 [M, I], token scale fp32 [M, 1], coefficients fp32 [M, r] or None.
    """
    parts = {"shift": shift, "scale": scale, "left": left, "right": right, "low_rank_basis": low_rank_basis}
    if x.dtype == torch.float64:
        return reference.activation_path(x, num_bits=num_bits, deflates=deflates, clip_ratio=clip_ratio, **parts)
    size = min(len(x), chunk_rows(x))
    transform = _Transform(x, size, deflates=deflates, **parts)
    codes = torch.empty(x.shape, dtype=torch.int8, device="cpu")
    token_scales = torch.empty(len(x), 1, dtype=torch.float32, device="cpu")
    coefficients = None
    if low_rank_basis is not None:
        coefficients = torch.empty(len(x), low_rank_basis.shape[1], dtype=torch.float32, device="cpu")
    lowest, highest = code_range(num_bits)
    for start in range(0, len(x), max(1, size)):
        part = slice(start, start + size)
        y, own_coefficients = transform(x[part])
        own_clip = clip_ratio[part] if isinstance(clip_ratio, Tensor) and len(clip_ratio) == len(x) else clip_ratio
        token_scales[part] = own = token_scale_from_amax(_amax(y), num_bits=num_bits, clip_ratio=own_clip)
        codes[part] = _in_fp32(torch.div, y, own, out=transform.wide).round_().clamp_(lowest, highest)
        if coefficients is not None and own_coefficients is not None:
            coefficients[part] = own_coefficients
    return codes, token_scales, coefficients


def chunk_rows(x: Tensor) -> int:
    """Return how many rows of x are worked on at a time.

    Args:
        x: [M, I].
    """
    return max(MIN_ROWS.get(x.dtype, 32), CHUNK_BYTES // max(1, x.shape[1] * x.element_size()))


class _Transform:
    """`reference.transform_input` of chunks of at most so many rows; the next chunk overwrites the result of one."""

    def __init__(
        self,
        x: Tensor,
        rows: int,
        *,
        shift: Tensor | None,
        scale: Tensor | None,
        left: Tensor | None,
        right: Tensor | None,
        low_rank_basis: Tensor | None,
        deflates: bool,
    ) -> None:
        features, dtype = x.shape[1], reference.product_dtype(x)
        self.shift, self.scale, self.deflates = shift, scale, deflates
        factors = (left, right, low_rank_basis)
        self.left, self.right, self.basis = (None if one is None else one.to(dtype) for one in factors)
        n1 = 1 if left is None else left.shape[0]
        self.grid = n1, features // n1 if right is None else right.shape[0]
        self.wide = take("activation_path wide", (rows, features), torch.float32)
        self.first, self.second = (take(f"activation_path {one}", (rows, features), dtype) for one in (1, 2))

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self._shifted_and_scaled(x)
        if self.basis is None and self.left is None and self.right is None:
            return x, None
        first, second = self.first[: len(x)], self.second[: len(x)]
        coefficients = None
        y = x if x.dtype == first.dtype and x.is_contiguous() and self.basis is None else first.copy_(x)
        if self.basis is not None:
            coefficients = y @ self.basis
            if self.deflates:
                y.addmm_(coefficients, self.basis.t(), alpha=-1)
            elif self.left is None and self.right is None:
                return x, coefficients
        n1, n2 = self.grid
        if self.right is not None:
            y, free = torch.mm(y.view(-1, n2), self.right, out=second.view(-1, n2)), first
        else:
            free = second
        if self.left is not None:
            left = self.left.t().expand(len(x), n1, n1)
            y = torch.bmm(left, y.view(-1, n1, n2), out=free.view(-1, n1, n2))
        return y.view(x.shape), coefficients

    def _shifted_and_scaled(self, x: Tensor) -> Tensor:
        if self.shift is not None:
            x = _in_fp32(torch.sub, x, self.shift, out=self.wide)
        if self.scale is not None:
            x = _in_fp32(torch.mul, x, self.scale, out=self.wide)
        return x


def _in_fp32(operation: Callable[..., Tensor], x: Tensor, other: Tensor, *, out: Tensor) -> Tensor:
    """Combine x of any dtype with fp32 numbers, in the first rows of a buffer.

    An operation on two dtypes takes longer than a conversion and one on fp32.
    """
    out = out[: len(x)]
    return operation(x if x.dtype == torch.float32 else out.copy_(x), other, out=out)


def _amax(x: Tensor) -> Tensor:
    """The largest magnitude of each row, [M, 1], in half the time that it takes on floating-point numbers."""
    integers, magnitude = _MAGNITUDES[x.dtype]
    bits = take("activation_path bits", tuple(x.shape), integers)
    torch.bitwise_and(x.view(integers), magnitude, out=bits)
    return bits.amax(dim=-1, keepdim=True).view(x.dtype)
