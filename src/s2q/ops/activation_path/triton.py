"""The path of an activation into an integer product, fused: one read of x, one write of codes and scales.

A program takes a few tokens one after the other and loads the next one while it computes. A token's features are a grid
X [n1, n2], padded to powers of two with zeros, and y = (Aᵀ · X) · B are two products on tensor cores; the grid never
leaves the registers until its codes do. Without factors a token is read twice, for its maximum and for its codes; the
second read hits the cache.

The low-rank branch has a kernel of its own, which runs first: c = x₁ · V and, where the branch is taken out of the
input, x₁ - c · Vᵀ, which the second kernel reads in place of x. A program takes tokens side by side there, because V is
larger than a token. For each bf16 value, 7 bytes are read and written (x, the rest twice, the code), or 9 where the
second read of x misses the cache; without a branch 3.

Precision. Without factors every step is the reference's IEEE arithmetic: equal bits, except that the scaling of a mean
may be fused with its subtraction. With factors the sums have another order, so a value near a rounding boundary may
land on the other side (the code next to it):
- "tf32x3" (for fp32 and fp16 input): fp32 in three products of tf32 parts, which keep 21 bits of the 24.
- "bf16" (for bf16 input): the scaled input, both factors and Aᵀ · X are rounded to bf16, as the reference rounds them;
  the result, which the reference rounds too, is not.
The rotation of grids that are too large for a program (see `tiles`) is computed by torch first, `PIECE_ROWS` tokens at
a time.

Shapes: `M` tokens, `I` features, `n1`, `n2` orders of A (left) and B (right), `r` rank.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2q.common.errors import InvalidInputError, unknown_name
from s2q.core.cubes import QuantizedMeans
from s2q.core.input_path import InputTensors
from s2q.ops.activation_path.reference import product_dtype, transform_input
from s2q.ops.activation_path.tiles import MAX_RANK, PRECISIONS, low_rank_tile, rotation_tile, row_block
from s2q.ops.architectures import Tile
from s2q.ops.dispatch import KernelUnavailableError, architecture_of, launch
from s2q.ops.kronecker import factor_orders
from s2q.ops.triton_math import INTERPRETING, magnitude_bits, matrix_product, quantization_scale, quantize

PIECE_ROWS = 4096
"""Tokens at a time where torch prepares them: bounds its fp32 copies of x to 4,096 · I · 4 bytes each.

Where the branch is taken out of the input inside of a kernel it is twice that, in the dtype of products.
"""


def activation_path(
    x: Tensor,
    path: InputTensors,
    *,
    num_bits: int,
    means: QuantizedMeans | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Transform and quantize the input of a linear; see `reference.activation_path`.

    Args:
        x: [M, I], fp32, fp16 or bf16; rows may be strided.
        precision: Of the rotation, "tf32x3" or "bf16"; None is "bf16" for bf16 x and "tf32x3" otherwise.

    Raises:
        InvalidInputError: If there is no such precision or the shapes do not fit.
    """
    precision = precision or ("bf16" if x.dtype == torch.bfloat16 else "tf32x3")
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    rows, features = x.shape
    codes = torch.empty(rows, features, dtype=torch.int8, device=x.device)
    token_scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    clip = _clip_of(path.clip_ratio, x)
    rotation = _rotation_of(x, path, precision)
    is_outside = rotation is None and (path.left is not None or path.right is not None)
    coefficients = None
    if path.low_rank_basis is not None:
        coefficients = torch.empty(rows, path.low_rank_basis.shape[1], dtype=torch.float32, device=x.device)
    copies = path.low_rank_basis is not None and path.deflates
    step = PIECE_ROWS if is_outside else 2 * PIECE_ROWS if copies else max(rows, 1)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        piece, rest = x[part], path._replace(clip_ratio=clip if clip is None or len(clip) == 1 else clip[part])
        if coefficients is not None:
            remainder = _split_low_rank(piece, path, coefficients=coefficients[part])
            if remainder is not None:
                piece, rest = remainder, rest._replace(shift=None, scale=None)
        if is_outside:
            piece, _ = transform_input(piece, rest._replace(low_rank_basis=None))
            rest = rest._replace(shift=None, scale=None)
        of_cubes = means if means is None else means._replace(rows=means.rows[part])
        _run(piece, rest, rotation, of_cubes, codes[part], token_scale[part], num_bits=num_bits)
    return codes, token_scale, coefficients


def _split_low_rank(x: Tensor, path: InputTensors, *, coefficients: Tensor) -> Tensor | None:
    """Write c [M, r] of x [M, I]; return x₁ - c · Vᵀ in the dtype of products where the branch is taken out of x."""
    assert path.low_rank_basis is not None
    rows, features = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    basis = path.low_rank_basis.contiguous()
    rest = torch.empty(x.shape, dtype=product_dtype(x), device=x.device) if path.deflates else None
    constants = low_rank_constants(features, basis.shape[1], x.dtype, deflates=path.deflates)
    constants |= {"HAS_SHIFT": path.shift is not None, "HAS_SCALE": path.scale is not None, "INTERPRET": INTERPRETING}
    vectors = [_or(vector, x) for vector in (path.shift, path.scale)]
    grid = (triton.cdiv(rows, constants["TOKENS"]),)
    target = coefficients if rest is None else rest
    launch(low_rank_kernel, grid, x, *vectors, basis, coefficients, target, rows, x.stride(0), **constants)
    return rest


def low_rank_constants(features: int, rank: int, dtype: torch.dtype, *, deflates: bool) -> dict[str, Any]:
    """Return the tile and constants of `low_rank_kernel` for inputs [M, I] of a dtype.

    Raises:
        KernelUnavailableError: If the sums of so many directions do not fit in the registers of a program.
    """
    block = max(16, triton.next_power_of_2(rank))
    tile = low_rank_tile(block)
    if tile is None:
        raise KernelUnavailableError(f"got a low-rank branch of rank {rank}; expected at most {MAX_RANK}")
    precision = "bf16" if dtype == torch.bfloat16 else "tf32x3"
    constants = {"FEATURES": features, "RANK": rank, "RANK_BLOCK": block, "DEFLATES": deflates}
    return tile | constants | {"PRECISION": precision}


def _rotation_of(x: Tensor, path: InputTensors, precision: str) -> dict[str, Any] | None:
    """Return the constants of `rotate_quantize_kernel`; None where it has nothing to do, or no tile for the grid."""
    if x.ndim != 2:
        raise InvalidInputError(f"activation_path: got x of shape {list(x.shape)}; expected [tokens, features]")
    n1, n2 = factor_orders(x.shape[1], path.left, path.right)
    if n1 * n2 != x.shape[1]:
        raise InvalidInputError(f"activation_path: got factors of order {n1} and {n2} for {x.shape[1]} features")
    sides = path.left is not None, path.right is not None
    tile = rotation_tile(n1, n2, precision=precision, architecture=architecture_of(x)) if any(sides) else None
    return None if tile is None else rotation_constants(tile, (n1, n2), precision, sides)


def _clip_of(clip_ratio: Tensor | None, x: Tensor) -> Tensor | None:
    """Return the clip ratio as fp32 [1] or [M]."""
    if clip_ratio is None:
        return None
    clip = clip_ratio.to(device=x.device, dtype=torch.float32).reshape(-1).contiguous()
    if len(clip) not in (1, x.shape[0]):
        raise InvalidInputError(
            f"activation_path: got clip ratios of shape {list(clip_ratio.shape)}; expected them to broadcast to "
            f"[{x.shape[0]}, 1]"
        )
    return clip


def _run(
    x: Tensor,
    path: InputTensors,
    rotation: dict[str, Any] | None,
    means: QuantizedMeans | None,
    codes: Tensor,
    token_scale: Tensor,
    *,
    num_bits: int,
) -> None:
    """Launch the kernel that fits; writes codes [M, I] and token scales [M, 1]."""
    rows, features = x.shape
    if features == 0:
        token_scale.fill_(1)
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    clip = path.clip_ratio
    constants: dict[str, Any] = {
        "HAS_SHIFT": path.shift is not None,
        "HAS_SCALE": path.scale is not None,
        "HAS_CLIP": clip is not None,
        "HAS_MEANS": means is not None,
        "QMAX": 2 ** (num_bits - 1) - 1,
    }
    vectors = [_or(vector, x) for vector in (path.shift, path.scale)]
    clip_stride = 0 if clip is None or len(clip) == 1 else 1
    of_cubes = (x, x, x) if means is None else [tensor.contiguous() for tensor in means]
    tail = (_or(clip, x), *of_cubes, codes, token_scale)
    if rotation is None:
        block, num_warps = row_block(features)
        constants |= {"FEATURES": features, "BLOCK": block}
        launch(quantize_kernel, (rows,), x, *vectors, *tail, x.stride(0), clip_stride, **constants, num_warps=num_warps)
        return
    factors = [_or(factor, x) for factor in (path.left, path.right)]
    constants |= rotation | {"INTERPRET": INTERPRETING}
    arguments = (x, *vectors, *factors, *tail, rows, x.stride(0), clip_stride)
    launch(rotate_quantize_kernel, (triton.cdiv(rows, rotation["TOKENS"]),), *arguments, **constants)


def _or(tensor: Tensor | None, unused: Tensor) -> Tensor:
    """Return a tensor as the kernels read it, or something in its place that they do not read."""
    return unused if tensor is None else tensor.float().contiguous()


def rotation_constants(
    tile: Tile, grid: tuple[int, int], precision: str, sides: tuple[bool, bool]
) -> dict[str, int | str]:
    """Return the tile and constants of `rotate_quantize_kernel` for a grid (n1, n2) with these factors (sides)."""
    return tile | {"N1": grid[0], "N2": grid[1], "PRECISION": precision, "HAS_LEFT": sides[0], "HAS_RIGHT": sides[1]}


@triton.jit
def _scaled(x, shift_ptr, scale_ptr, offsets, valid, HAS_SHIFT: tl.constexpr, HAS_SCALE: tl.constexpr):
    """Return (x - shift) · scale in fp32, for x of the features at `offsets`, 0 outside of `valid`."""
    x = x.to(tl.float32)
    if HAS_SHIFT:
        x = x - tl.load(shift_ptr + offsets, mask=valid, other=0.0)
    if HAS_SCALE:
        x = x * tl.load(scale_ptr + offsets, mask=valid, other=0.0)
    return x


@triton.jit(do_not_specialize=["rows"])
def low_rank_kernel(
    x_ptr,
    shift_ptr,
    scale_ptr,
    basis_ptr,
    coefficients_ptr,
    rest_ptr,
    rows,
    x_stride,
    FEATURES: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    DEFLATES: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Project TOKENS scaled tokens on the basis, BLOCK features at a time; with DEFLATES subtract what it spans."""
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    present = row < rows
    rank = tl.arange(0, RANK_BLOCK)[None, :]
    sums = tl.zeros((TOKENS, RANK_BLOCK), dtype=tl.float32)
    for start in range(0, FEATURES, BLOCK):
        feature = start + tl.arange(0, BLOCK)
        valid = feature < FEATURES
        x = tl.load(x_ptr + row * x_stride + feature[None, :], mask=present & valid[None, :], other=0.0)
        x = _scaled(x, shift_ptr, scale_ptr, feature[None, :], valid[None, :], HAS_SHIFT, HAS_SCALE)
        inside = valid[:, None] & (rank < RANK)
        basis = tl.load(basis_ptr + feature[:, None] * RANK + rank, mask=inside, other=0.0).to(tl.float32)
        sums += matrix_product(x, basis, PRECISION, INTERPRET)
    if PRECISION == "bf16":  # as a product of bf16 matrices gives it
        sums = sums.to(tl.bfloat16).to(tl.float32)
    tl.store(coefficients_ptr + row * RANK + rank, sums, mask=present & (rank < RANK))
    if DEFLATES:
        for start in range(0, FEATURES, BLOCK):
            feature = start + tl.arange(0, BLOCK)
            valid = feature < FEATURES
            x = tl.load(x_ptr + row * x_stride + feature[None, :], mask=present & valid[None, :], other=0.0)
            x = _scaled(x, shift_ptr, scale_ptr, feature[None, :], valid[None, :], HAS_SHIFT, HAS_SCALE)
            if PRECISION == "bf16":
                x = x.to(tl.bfloat16).to(tl.float32)
            inside = valid[:, None] & (rank < RANK)
            basis = tl.load(basis_ptr + feature[:, None] * RANK + rank, mask=inside, other=0.0).to(tl.float32)
            rest = x - matrix_product(sums, tl.trans(basis), PRECISION, INTERPRET)
            rest_at = rest_ptr + row * FEATURES + feature[None, :]
            tl.store(rest_at, rest.to(rest_ptr.dtype.element_ty), mask=present & valid[None, :])


@triton.jit
def _less_mean(y, codes_ptr, scale_ptr, cube, offsets, valid, FEATURES: tl.constexpr):
    """Return y less the dequantized mean of a cube."""
    codes = tl.load(codes_ptr + cube.to(tl.int64) * FEATURES + offsets, mask=valid, other=0)
    return y - codes.to(tl.float32) * tl.load(scale_ptr + cube)


@triton.jit
def quantize_kernel(
    x_ptr,
    shift_ptr,
    scale_ptr,
    clip_ptr,
    mean_codes_ptr,
    mean_scale_ptr,
    cubes_ptr,
    codes_ptr,
    token_scale_ptr,
    x_stride,
    clip_stride,
    FEATURES: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    HAS_MEANS: tl.constexpr,
    QMAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantize one token without a rotation, BLOCK features at a time."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    if HAS_MEANS:
        cube = tl.load(cubes_ptr + row)
    highest = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, FEATURES, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        valid = offsets < FEATURES
        x = tl.load(x_ptr + offsets, mask=valid, other=0.0)
        x = _scaled(x, shift_ptr, scale_ptr, offsets, valid, HAS_SHIFT, HAS_SCALE)
        if HAS_MEANS:
            x = _less_mean(x, mean_codes_ptr, mean_scale_ptr, cube, offsets, valid, FEATURES)
        highest = tl.maximum(highest, magnitude_bits(x))
    clip = 1.0
    if HAS_CLIP:
        clip = tl.load(clip_ptr + row * clip_stride)
    scale = quantization_scale(tl.max(highest, axis=0), clip, QMAX)
    tl.store(token_scale_ptr + row, scale)
    for start in range(0, FEATURES, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        valid = offsets < FEATURES
        x = tl.load(x_ptr + offsets, mask=valid, other=0.0)
        x = _scaled(x, shift_ptr, scale_ptr, offsets, valid, HAS_SHIFT, HAS_SCALE)
        if HAS_MEANS:
            x = _less_mean(x, mean_codes_ptr, mean_scale_ptr, cube, offsets, valid, FEATURES)
        tl.store(codes_ptr + row * FEATURES + offsets, quantize(x, scale, QMAX), mask=valid)


@triton.jit(do_not_specialize=["rows"])
def rotate_quantize_kernel(
    x_ptr,
    shift_ptr,
    scale_ptr,
    left_ptr,
    right_ptr,
    clip_ptr,
    mean_codes_ptr,
    mean_scale_ptr,
    cubes_ptr,
    codes_ptr,
    token_scale_ptr,
    rows,
    x_stride,
    clip_stride,
    N1: tl.constexpr,
    N2: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    HAS_MEANS: tl.constexpr,
    QMAX: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Rotate and quantize TOKENS tokens, one after the other; the next one is loaded meanwhile."""
    r1 = tl.arange(0, ROWS)
    r2 = tl.arange(0, COLUMNS)
    valid = (r1 < N1)[:, None] & (r2 < N2)[None, :]
    offsets = r1[:, None] * N2 + r2[None, :]
    if HAS_LEFT:  # transposed: entry [i, k] is A[k, i]
        left_valid = (r1 < N1)[:, None] & (r1 < N1)[None, :]
        left = tl.load(left_ptr + r1[None, :] * N1 + r1[:, None], mask=left_valid, other=0.0)
        if PRECISION == "bf16":
            left = left.to(tl.bfloat16)
    if HAS_RIGHT:
        right_valid = (r2 < N2)[:, None] & (r2 < N2)[None, :]
        right = tl.load(right_ptr + r2[:, None] * N2 + r2[None, :], mask=right_valid, other=0.0)
        if PRECISION == "bf16":
            right = right.to(tl.bfloat16)
    first = tl.program_id(0).to(tl.int64) * TOKENS
    following = tl.load(x_ptr + first * x_stride + offsets, mask=valid & (first < rows), other=0.0)
    for token in range(TOKENS):
        row = first + token
        present = row < rows
        y = _scaled(following, shift_ptr, scale_ptr, offsets, valid, HAS_SHIFT, HAS_SCALE)
        is_there = (row + 1 < rows) & (token + 1 < TOKENS)
        following = tl.load(x_ptr + (row + 1) * x_stride + offsets, mask=valid & is_there, other=0.0)
        if HAS_LEFT:
            y = matrix_product(left, y, PRECISION, INTERPRET)
        if HAS_RIGHT:
            y = matrix_product(y, right, PRECISION, INTERPRET)
        if HAS_MEANS:
            cube = tl.load(cubes_ptr + row, mask=present, other=0)
            y = _less_mean(y, mean_codes_ptr, mean_scale_ptr, cube, offsets, valid, N1 * N2)
        # One reduction over both axes: Triton 3.7 does not compile one after the other for sm_100.
        highest = tl.max(tl.where(valid, magnitude_bits(y), 0))
        clip = 1.0
        if HAS_CLIP:
            clip = tl.load(clip_ptr + row * clip_stride, mask=present, other=1.0)
        scale = quantization_scale(highest, clip, QMAX)
        tl.store(token_scale_ptr + row, scale, mask=present)
        tl.store(codes_ptr + row * (N1 * N2) + offsets, quantize(y, scale, QMAX), mask=valid & present)
