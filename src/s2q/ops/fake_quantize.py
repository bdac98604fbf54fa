"""Fake quantization of rows by their largest magnitudes, trainable: tokens of an input, channels or groups of a weight.

    Δ = clip_ratio · max|x| / (2^(N-1) - 1),    y = clamp(round(x / Δ)) · Δ

The specification is `core.qparams.fake_quantize_rows`, whose operations read and write all of x many times. On a CPU
with compiled passes (`ops.fused`) there is one pass forward and two backward, around PyTorch's sum of each row, with
the same bits.

Shapes: `n` values of a row.
"""

from typing import Any

import torch
from torch import Tensor

from s2q.core import qparams
from s2q.core.qparams import ClipRatio
from s2q.ops.fused import passes


def fake_quantize_rows(x: Tensor, *, num_bits: int, clip_ratio: ClipRatio = None, of_weight: bool = False) -> Tensor:
    """Quantize and dequantize each row of x [..., n], floating, with a dynamic scale; returns its shape and dtype.

    The clip ratio in (0, 1] broadcasts to [..., 1]. The scales of a weight are rounded as they are stored. Gradients
    towards x and the ratio are those of `core.qparams`.
    """
    is_plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()
    if is_plain and passes() is not None:
        if not isinstance(clip_ratio, Tensor):
            clip_ratio = torch.full((1,), 1.0 if clip_ratio is None else clip_ratio, dtype=torch.float32, device="cpu")
        values: Tensor = _FakeQuantizeRows.apply(x, clip_ratio, num_bits, of_weight)  # type: ignore[no-untyped-call]
        return values
    return qparams.fake_quantize_rows(x, num_bits=num_bits, clip_ratio=clip_ratio, of_weight=of_weight)


class _FakeQuantizeRows(torch.autograd.Function):
    """The compiled passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip_ratio: Tensor, num_bits: int, of_weight: bool) -> Tensor:
        compiled = passes()
        assert compiled is not None
        x, scales = x.contiguous(), (*x.shape[:-1], 1)
        ratios = clip_ratio if clip_ratio.numel() == 1 else clip_ratio.expand(scales)
        ratios = ratios.flatten().float().contiguous()
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
        grad_x, slope, grad_clip = torch.empty_like(x), torch.empty_like(x), torch.empty_like(amax)
        compiled.fake_quantize_gradient(
            _rows(x), grad, scale, num_bits=ctx.options["num_bits"], grad_x=grad_x, slope=slope
        )
        sums = slope.sum_to_size(scale.shape).contiguous()
        compiled.scale_gradient(_rows(x), amax, sums, ratios, **ctx.options, grad_x=grad_x, grad_clip=grad_clip)
        return grad_x, grad_clip.sum_to_size(ctx.clip_shape) if ctx.needs_input_grad[1] else None, None, None


def _rows(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])
