"""Trainable fake quantization of rows on a GPU: one kernel forward and one backward, each reads a row twice.

The first pass over a row finds its largest magnitude, or sums the gradient of its scale; the second writes. Rows that
are shorter than a tile share a program. The sum of a row has another order than the reference's. Values are computed
in fp32 whatever the dtype of x. UNTUNED.

Shapes: `M` rows, `n` values of a row.
"""

import logging
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2q.common.log import log_once
from s2q.core import qparams
from s2q.core.qparams import ClipRatio, code_range
from s2q.ops.dispatch import KernelUnavailableError, launch
from s2q.ops.fake_quantize.cpu import ratio_tensor, row_ratios
from s2q.ops.triton_math import magnitude_bits, round_to_even

logger = logging.getLogger(__name__)

TILE = 2048
"""Values of a program at a time."""


def fake_quantize(x: Tensor, *, num_bits: int, clip_ratio: ClipRatio = None, of_weight: bool = False) -> Tensor:
    """Quantize and dequantize each row of x; see `ops.fake_quantize.fake_quantize_rows`."""
    values: Tensor = _FakeQuantizeRows.apply(x, ratio_tensor(x, clip_ratio), num_bits, of_weight)  # type: ignore[no-untyped-call]
    return values


def row_constants(length: int, *, num_bits: int, of_weight: bool) -> dict[str, Any]:
    """Return the constants of both kernels for rows of a length."""
    columns = min(triton.next_power_of_2(length), TILE)
    constants = {"LENGTH": length, "COLUMNS": columns, "ROWS": TILE // columns}
    return constants | {"QMAX": code_range(num_bits)[1], "OF_WEIGHT": of_weight, "num_warps": 8}


class _FakeQuantizeRows(torch.autograd.Function):
    """The kernels; x is kept for the backward pass, which rounds once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip_ratio: Tensor, num_bits: int, of_weight: bool) -> Tensor:
        x, ratios = x.contiguous(), row_ratios(x, clip_ratio)
        out, amax = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        ctx.options = {"num_bits": num_bits, "of_weight": of_weight}
        if x.numel():
            constants = row_constants(x.shape[-1], **ctx.options)
            _launch(fake_quantize_kernel, x, ratios, out, amax, constants=constants)
        ctx.save_for_backward(x, amax, ratios, clip_ratio)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, amax, ratios, clip_ratio = ctx.saved_tensors
        grad, grad_x, grad_clip = grad_outputs[0].contiguous(), torch.empty_like(x), torch.zeros_like(amax)
        if x.numel():
            constants = row_constants(x.shape[-1], **ctx.options)
            try:
                _launch(gradient_kernel, x, ratios, grad, amax, grad_x, grad_clip, constants=constants)
            except KernelUnavailableError as error:  # after a forward pass that ran
                log_once(logger, logging.WARNING, f"the gradient of fake_quantize runs in PyTorch: {error.reason}")
                return *_reference_gradient(x, clip_ratio, grad, **ctx.options), None, None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None, None
        return grad_x, grad_clip.sum_to_size(clip_ratio.shape).to(clip_ratio.dtype), None, None


def _reference_gradient(x: Tensor, clip_ratio: Tensor, grad: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        inputs = x.detach().requires_grad_(), clip_ratio.detach().requires_grad_()
        values = qparams.fake_quantize_rows(inputs[0], clip_ratio=inputs[1], **options)
        towards_x, towards_ratio = torch.autograd.grad(values, inputs, grad)
    return towards_x, towards_ratio


def _launch(kernel: Any, x: Tensor, ratios: Tensor, *others: Tensor, constants: dict[str, Any]) -> None:
    rows = x.numel() // x.shape[-1]
    grid = (triton.cdiv(rows, constants["ROWS"]),)
    with torch.cuda.device(x.device if x.is_cuda else -1):  # autograd's threads have another current device
        launch(kernel, grid, x, ratios, *others, rows, 0 if len(ratios) == 1 else 1, **constants)


@triton.jit
def _tile(start, rows, inside, LENGTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets of the next columns of rows, and which of them are there; both [ROWS, COLUMNS]."""
    columns = start + tl.arange(0, COLUMNS)[None, :]
    return rows * LENGTH + columns, inside & (columns < LENGTH)


@triton.jit
def _load(pointer, at, here):
    """Values at offsets in fp32; 0 where there are none."""
    return tl.load(pointer + at, mask=here, other=0.0).to(tl.float32)


@triton.jit
def _largest(x_ptr, rows, inside, LENGTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Largest magnitudes of rows, fp32 [ROWS, 1]; NaN for a row with one."""
    bits = tl.zeros((ROWS, 1), dtype=tl.int32)
    for start in range(0, LENGTH, COLUMNS):
        at, here = _tile(start, rows, inside, LENGTH, COLUMNS)
        bits = tl.maximum(bits, tl.max(magnitude_bits(_load(x_ptr, at, here)), axis=1, keep_dims=True))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _row_scale(amax, ratio, QMAX: tl.constexpr, OF_WEIGHT: tl.constexpr):
    """Scale Δ of each row, rounded to bf16 for a weight; 0 where all values are 0 or Δ underflows."""
    scale = tl.div_rn(amax * ratio, QMAX * 1.0)
    if OF_WEIGHT:
        bits = scale.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        scale = tl.where(scale == scale, bits.to(tl.float32, bitcast=True), scale)
    return scale


@triton.jit
def _steps(x, scale, QMAX: tl.constexpr):
    """Return x / Δ, that rounded, and clamped; what is far outside is bounded before it is rounded."""
    steps = tl.div_rn(x, scale)
    near = tl.maximum(steps, -QMAX - 3.0, propagate_nan=tl.PropagateNan.ALL)
    near = tl.minimum(near, QMAX + 3.0, propagate_nan=tl.PropagateNan.ALL)
    rounded = round_to_even(near)
    codes = tl.maximum(rounded, -QMAX - 1.0, propagate_nan=tl.PropagateNan.ALL)
    return steps, rounded, tl.minimum(codes, QMAX * 1.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def fake_quantize_kernel(
    x_ptr,
    ratio_ptr,
    out_ptr,
    amax_ptr,
    num_rows,
    ratio_stride,
    LENGTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    QMAX: tl.constexpr,
    OF_WEIGHT: tl.constexpr,
):
    """Quantize and dequantize ROWS rows; write them and their largest magnitudes."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = rows < num_rows
    amax = _largest(x_ptr, rows, inside, LENGTH, COLUMNS, ROWS)
    tl.store(amax_ptr + rows, amax, mask=inside)
    scale = _row_scale(amax, tl.load(ratio_ptr + rows * ratio_stride, mask=inside, other=1.0), QMAX, OF_WEIGHT)
    scale = tl.where(scale == 0.0, 1.0, scale)
    for start in range(0, LENGTH, COLUMNS):
        at, here = _tile(start, rows, inside, LENGTH, COLUMNS)
        _, _, codes = _steps(_load(x_ptr, at, here), scale, QMAX)
        tl.store(out_ptr + at, codes * scale, mask=here)


@triton.jit
def gradient_kernel(
    x_ptr,
    ratio_ptr,
    grad_ptr,
    amax_ptr,
    grad_x_ptr,
    grad_ratio_ptr,
    num_rows,
    ratio_stride,
    LENGTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    QMAX: tl.constexpr,
    OF_WEIGHT: tl.constexpr,
):
    """Gradients of ROWS rows towards x, through the values and through their scales, and towards their clip ratios.

    The gradient of the largest magnitude is shared by all values of that magnitude.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = rows < num_rows
    amax = tl.load(amax_ptr + rows, mask=inside, other=0.0)
    ratio = tl.load(ratio_ptr + rows * ratio_stride, mask=inside, other=1.0)
    stored = _row_scale(amax, ratio, QMAX, OF_WEIGHT)
    scale = tl.where(stored == 0.0, 1.0, stored)
    slopes = tl.zeros((ROWS, 1), dtype=tl.float32)
    count = tl.zeros((ROWS, 1), dtype=tl.int32)
    for start in range(0, LENGTH, COLUMNS):
        at, here = _tile(start, rows, inside, LENGTH, COLUMNS)
        x, grad = _load(x_ptr, at, here), _load(grad_ptr, at, here)
        steps, rounded, codes = _steps(x, scale, QMAX)
        slope = tl.where(rounded == codes, codes - steps, codes) * grad
        slopes += tl.sum(slope, axis=1, keep_dims=True)
        count += tl.sum((here & (tl.abs(x) == amax)).to(tl.int32), axis=1, keep_dims=True)
    not_finite = scale - scale  # 0, or NaN for a row with a NaN or an infinite value, whose gradients are NaN
    of_amax = tl.where(stored == 0.0, 0.0, slopes / QMAX) + not_finite
    tl.store(grad_ratio_ptr + rows, of_amax * amax, mask=inside)
    share = tl.where(amax == 0.0, 0.0, of_amax * ratio / tl.maximum(count, 1).to(tl.float32))
    for start in range(0, LENGTH, COLUMNS):
        at, here = _tile(start, rows, inside, LENGTH, COLUMNS)
        x, grad = _load(x_ptr, at, here), _load(grad_ptr, at, here)
        _, rounded, codes = _steps(x, scale, QMAX)
        towards_x = tl.where(rounded == codes, grad, 0.0)
        towards_x += not_finite + tl.where(x == amax, share, tl.where(x == -amax, -share, 0.0))
        tl.store(grad_x_ptr + at, towards_x, mask=here)
