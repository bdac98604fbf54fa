"""Fake quantization of rows by their largest magnitudes, trainable: tokens of an input, channels or groups of a weight.

    Δ = clip_ratio · max|x| / (2^(N-1) - 1),    y = clamp(round(x / Δ)) · Δ

The specification is `core.qparams.fake_quantize_rows`, whose operations read and write all of x many times. On a CPU
with compiled passes (`ops.fused`) there is one pass forward and two backward, around PyTorch's sum of each row, with
the same bits. `fake_quantize_input` has the rows of a scheme: tokens, their groups, and their differences from means.

Shapes: `n` values of a row; `N` tokens, `I` in features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from s2q.core import qparams
from s2q.core.codebook import level_unit, levels_of
from s2q.core.cubes import cube_means, spread
from s2q.core.qparams import ClipRatio, group_scale, token_scale_of_levels
from s2q.core.schemes import UNIFORM, QuantScheme, num_groups
from s2q.core.tokens import TokenGrid
from s2q.ops.fused import passes


def fake_quantize_rows(x: Tensor, *, num_bits: int, clip_ratio: ClipRatio = None, of_weight: bool = False) -> Tensor:
    """Quantize and dequantize each row of x [..., n], floating, with a dynamic scale; returns its shape and dtype.

    The clip ratio in (0, 1] broadcasts to [..., 1]. Scales of a weight are rounded to the stored dtype. Gradients
    towards x and the ratio are those of `core.qparams`.
    """
    is_plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()
    if is_plain and passes() is not None:
        if not isinstance(clip_ratio, Tensor):
            clip_ratio = torch.full((1,), 1.0 if clip_ratio is None else clip_ratio, dtype=torch.float32, device="cpu")
        values: Tensor = _FakeQuantizeRows.apply(x, clip_ratio, num_bits, of_weight)  # type: ignore[no-untyped-call]
        return values
    return qparams.fake_quantize_rows(x, num_bits=num_bits, clip_ratio=clip_ratio, of_weight=of_weight)


def fake_quantize_input(
    x: Tensor, scheme: QuantScheme, *, clip_ratio: ClipRatio = None, grid: TokenGrid | None = None
) -> Tensor:
    """Quantize and dequantize the input of a linear at once, trainable, each token by itself.

    Gradients are those of `core.qparams.fake_quantize`. With `scheme.delta`, a video token is the quantized mean of its
    cube plus its quantized difference from that; the gradient passes through the difference alone. The tokens of text,
    and all tokens if the grid is unknown or not that of x, are quantized without differences.

    Args:
        x: [..., I], floating; [..., N, I] where there is a grid.
        scheme: Dynamic, PerToken or PerGroup.
        clip_ratio: Factor in (0, 1] on the scale, broadcasts to [..., 1]. Means are not clipped.
        grid: Where the video tokens lie among N.
    """
    offset = None if scheme.delta is None or grid is None or x.ndim == 2 else grid.offset(x.shape[-2])
    if offset is None or grid is None:
        return _fake_quantize_tokens(x, scheme, clip_ratio)
    means = _quantized_means(x, scheme, grid, offset)
    return (means + _fake_quantize_tokens(x - means, scheme, clip_ratio)).to(x.dtype)


@torch.no_grad()
def _quantized_means(x: Tensor, scheme: QuantScheme, grid: TokenGrid, offset: int) -> Tensor:
    """The dequantized mean of each token's cube, fp32 [..., N, I]; 0 for text."""
    delta, sizes = scheme.delta, (grid.frames, grid.height, grid.width)
    assert delta is not None
    video = x.narrow(-2, offset, grid.tokens)
    means = cube_means(video.reshape(*x.shape[:-2], *sizes, x.shape[-1]), delta.cube)
    means = fake_quantize_rows(means, num_bits=delta.mean_bits)
    return F.pad(spread(means, delta.cube, sizes).flatten(-4, -2), (0, 0, offset, x.shape[-2] - offset - grid.tokens))


def _fake_quantize_tokens(x: Tensor, scheme: QuantScheme, clip_ratio: ClipRatio) -> Tensor:
    grouped = x.reshape(*x.shape[:-1], num_groups(scheme, x.shape[-1]), -1)
    if scheme.levels == UNIFORM:
        return fake_quantize_rows(grouped, num_bits=scheme.num_bits, clip_ratio=clip_ratio).reshape(x.shape)
    levels = levels_of(scheme, x.shape[-1], device=x.device)
    if scheme.is_fp4:
        scale = group_scale(grouped, scheme, clip_ratio=clip_ratio).unsqueeze(-1)
    else:
        scale = token_scale_of_levels(grouped, unit=level_unit(scheme, x.shape[-1]), clip_ratio=clip_ratio)
    return qparams.fake_quantize(grouped, scale, num_bits=scheme.num_bits, levels=levels).reshape(x.shape)


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
