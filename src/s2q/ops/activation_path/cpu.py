"""The activation path on the CPU: the reference's arithmetic in chunks of rows, in buffers that stay in the caches.

What is not a product takes one pass before them and one after them where a C compiler is (`ops.fused`). A rotated bf16
input takes one pass in all with AVX512-BF16.

Shapes: `M` tokens, `I` features, `n1`, `n2` orders of A (left) and B (right), `r` rank.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from s2q.core.cubes import QuantizedMeans
from s2q.core.input_path import InputTensors
from s2q.core.qparams import code_range, token_scale_from_amax
from s2q.ops.activation_path import reference
from s2q.ops.fused import passes
from s2q.ops.kronecker import factor_orders
from s2q.ops.passes import DTYPES, HIGHEST_RANK, IN_ORDER, LONGEST_ROW, ROTATED_ORDERS, Passes, vector
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
    x: Tensor, path: InputTensors, *, num_bits: int, means: QuantizedMeans | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Transform and quantize the input of a linear; see `reference.activation_path`, which fp64 is left to."""
    if x.dtype == torch.float64:
        return reference.activation_path(x, path, num_bits=num_bits, means=means)
    fused = passes()
    if fused is not None and _is_one_pass(fused, x, path):
        return _in_one_pass(fused, x, path, num_bits=num_bits, means=means)
    size = min(len(x), max(MIN_ROWS.get(x.dtype, 32), CHUNK_BYTES // max(1, x.shape[1] * x.element_size())))
    transform = _Transform(x, size, path)
    codes = torch.empty(x.shape, dtype=torch.int8, device="cpu")
    token_scales = torch.empty(len(x), 1, dtype=torch.float32, device="cpu")
    coefficients, clip = None, path.clip_ratio
    if path.low_rank_basis is not None:
        coefficients = torch.empty(len(x), path.low_rank_basis.shape[1], dtype=torch.float32, device="cpu")
    lowest, highest = code_range(num_bits)
    ratios = None if fused is None else vector(clip, len(x), missing=1.0, single=True)
    dequantized = None if means is None else means.codes.float().mul_(means.scale)
    for start in range(0, len(x), max(1, size)):
        chunk = slice(start, start + size)
        y, chunk_coefficients = transform(x[chunk])
        if means is not None:
            assert dequantized is not None
            mean = take("activation_path means", (len(y), y.shape[1]), torch.float32)
            torch.index_select(dequantized, 0, means.rows[chunk], out=mean)
            y = _in_fp32(torch.sub, y, mean, out=transform.wide)
        chunk_clip = clip[chunk] if clip is not None and clip.ndim > 0 and len(clip) == len(x) else clip
        if fused is not None and y.dtype in DTYPES and y.is_contiguous():
            assert ratios is not None
            chunk_ratios = ratios[chunk] if len(ratios) > 1 else ratios
            fused.quantize(y, chunk_ratios, num_bits=num_bits, codes=codes[chunk], scale=token_scales[chunk])
        else:
            scales = token_scale_from_amax(_amax(y), num_bits=num_bits, clip_ratio=chunk_clip)
            token_scales[chunk] = scales
            codes[chunk] = _in_fp32(torch.div, y, scales, out=transform.wide).round_().clamp_(lowest, highest)
        if coefficients is not None:
            assert chunk_coefficients is not None
            coefficients[chunk] = chunk_coefficients
    return codes, token_scales, coefficients


def _is_one_pass(fused: Passes, x: Tensor, path: InputTensors) -> bool:
    """Whether `Passes.activation_path` takes the input with the bits of PyTorch's operations."""
    left, right, basis, (rows, size) = path.left, path.right, path.low_rank_basis, x.shape
    if not fused.rotates or left is None or right is None or x.dtype != torch.bfloat16 or x.stride(1) != 1:
        return False
    if basis is not None:
        lowest = 1
        if size > IN_ORDER:  # one direction of a wide input is summed in yet another order
            lowest = 2 if fused.rotates_wide_branches else HIGHEST_RANK + 1
        if not lowest <= basis.shape[1] <= HIGHEST_RANK:
            return False
    return 0 < rows and size <= LONGEST_ROW and len(left) in ROTATED_ORDERS and len(right) in ROTATED_ORDERS


def _in_one_pass(
    fused: Passes, x: Tensor, path: InputTensors, *, num_bits: int, means: QuantizedMeans | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`activation_path` by `Passes.activation_path`."""
    basis, coefficients, rank = path.low_rank_basis, None, 0
    codes = torch.empty(x.shape, dtype=torch.int8, device="cpu")
    scale = torch.empty(len(x), 1, dtype=torch.float32, device="cpu")
    if basis is not None:
        rank = basis.shape[1]
        if rank % 2:  # a direction of zeros makes pairs of them
            basis = F.pad(basis.bfloat16(), (0, 1))
        coefficients = torch.empty(len(x), basis.shape[1], dtype=torch.float32, device="cpu")
    dequantized = None
    if means is not None:
        dequantized = (means.codes.float() * means.scale).contiguous(), means.rows.int().contiguous()
    fused.activation_path(
        x,
        path._replace(low_rank_basis=basis),
        vector(path.clip_ratio, len(x), missing=1.0, single=True),
        num_bits=num_bits,
        means=dequantized,
        codes=codes,
        scale=scale,
        coefficients=coefficients,
    )
    return codes, scale, None if coefficients is None else coefficients[:, :rank].contiguous()


class _Transform:
    """`reference.transform_input` of chunks of at most so many rows; the next chunk overwrites the result of one."""

    def __init__(self, x: Tensor, rows: int, path: InputTensors) -> None:
        features, dtype = x.shape[1], reference.product_dtype(x)
        self.shift, self.scale, self.deflates = path.shift, path.scale, path.deflates
        factors = (path.left, path.right, path.low_rank_basis)
        self.left, self.right, self.basis = (None if factor is None else factor.to(dtype) for factor in factors)
        # A transposed view takes a third longer to multiply by.
        self.left = None if self.left is None else self.left.t().contiguous()
        rounds = path.left is not None or path.right is not None or (path.low_rank_basis is not None and path.deflates)
        scales = path.shift is not None or path.scale is not None
        self.fused = passes() if rounds and scales and x.dtype == torch.bfloat16 and x.stride(1) == 1 else None
        if self.fused is not None:
            self.shift = vector(path.shift, features, missing=0.0)
            self.scale = vector(path.scale, features, missing=1.0)
        self.grid = factor_orders(features, path.left, path.right)
        self.wide = take("activation_path wide", (rows, features), torch.float32)
        self.first, self.second = (take(f"activation_path {use}", (rows, features), dtype) for use in ("1", "2"))

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        first, second = self.first[: len(x)], self.second[: len(x)]
        if self.fused is not None:
            assert self.shift is not None
            assert self.scale is not None
            x = self.fused.scale(x, self.shift, self.scale, out=first)
        else:
            if self.shift is not None:
                x = _in_fp32(torch.sub, x, self.shift, out=self.wide)
            if self.scale is not None:
                x = _in_fp32(torch.mul, x, self.scale, out=self.wide)
        if self.basis is None and self.left is None and self.right is None:
            return x, None
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
            y = torch.bmm(self.left.expand(len(x), n1, n1), y.view(-1, n1, n2), out=free.view(-1, n1, n2))
        return y.view(x.shape), coefficients


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
