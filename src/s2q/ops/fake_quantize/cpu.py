"""Fake quantization of rows on the CPU by the compiled passes of `ops.fused`; without them, by PyTorch's operations."""

from typing import Any

import torch
from torch import Tensor

from s2q.core import qparams
from s2q.core.qparams import ClipRatio
from s2q.ops.fused import passes


def fake_quantize(x: Tensor, *, num_bits: int, clip_ratio: ClipRatio = None, of_weight: bool = False) -> Tensor:
    """Quantize and dequantize each row of x; see `ops.fake_quantize.fake_quantize_rows`."""
    if x.dtype != torch.float32 or passes() is None:
        return qparams.fake_quantize_rows(x, num_bits=num_bits, clip_ratio=clip_ratio, of_weight=of_weight)
    values: Tensor = _FakeQuantizeRows.apply(x, ratio_tensor(x, clip_ratio), num_bits, of_weight)  # type: ignore[no-untyped-call]
    return values


def ratio_tensor(x: Tensor, clip_ratio: ClipRatio) -> Tensor:
    """Return a clip ratio as a tensor; a number as one value on the device of x."""
    if isinstance(clip_ratio, Tensor):
        return clip_ratio
    return torch.full((1,), 1.0 if clip_ratio is None else clip_ratio, dtype=torch.float32, device=x.device)


def row_ratios(x: Tensor, clip_ratio: Tensor) -> Tensor:
    """Return the clip ratio of each row of x [..., n], contiguous fp32 [rows], or [1] if all have the same."""
    ratios = clip_ratio if clip_ratio.numel() == 1 else clip_ratio.expand(*x.shape[:-1], 1)
    return ratios.flatten().float().contiguous()


class _FakeQuantizeRows(torch.autograd.Function):
    """The compiled passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip_ratio: Tensor, num_bits: int, of_weight: bool) -> Tensor:
        compiled = passes()
        assert compiled is not None
        x, scales, ratios = x.contiguous(), (*x.shape[:-1], 1), row_ratios(x, clip_ratio)
        out, amax, scale = torch.empty_like(x), x.new_empty(scales), x.new_empty(scales)
        ctx.options = {"num_bits": num_bits, "of_weight": of_weight}
        compiled.fake_quantize(_rows(x), ratios, **ctx.options, out=out, amax=amax, scale=scale)
        ctx.save_for_backward(x, amax, scale, ratios)
        ctx.clip_shape = clip_ratio.shape
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, amax, scale, ratios = ctx.saved_tensors
        compiled, grad = passes(), grad_outputs[0].contiguous()
        assert compiled is not None
        grad_x, grad_clip = torch.empty_like(x), torch.empty_like(amax)
        rows = _rows(x), grad, amax, scale, ratios
        compiled.fake_quantize_gradient(*rows, **ctx.options, grad_x=grad_x, grad_clip=grad_clip)
        return grad_x, grad_clip.sum_to_size(ctx.clip_shape) if ctx.needs_input_grad[1] else None, None, None


def _rows(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])
