"""Fake quantization of rows by their largest magnitudes, trainable: tokens of an input, channels or groups of a weight.

    Δ = clip_ratio · max|x| / (2^(N-1) - 1),    y = clamp(round(x / Δ)) · Δ

The specification is `core.qparams.fake_quantize_rows`, whose operations read and write all of x many times. On a CPU
with compiled passes (`ops.fused`) there is one pass forward and one backward, and on a GPU a kernel each, which reads a
row twice. Both have the values of the specification, and its gradients up to the order of the sum of each row.
`fake_quantize_input` has the rows of a scheme: tokens, their groups, and their differences from means.

Shapes: `n` values of a row; `N` tokens, `I` in features.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from s2q.core import qparams
from s2q.core.codebook import level_unit, levels_of
from s2q.core.cubes import cube_means, spread
from s2q.core.qparams import ClipRatio, group_scale, token_scale_of_levels
from s2q.core.schemes import UNIFORM, QuantScheme, num_groups
from s2q.core.tokens import TokenGrid
from s2q.ops.dispatch import choose_backend, triton_backend
from s2q.ops.fake_quantize import cpu

BACKENDS: dict[str, Callable[..., Tensor]] = {
    "reference": qparams.fake_quantize_rows,
    "cpu": cpu.fake_quantize,
    "triton": triton_backend("fake_quantize"),
}

__all__ = ["BACKENDS", "fake_quantize_input", "fake_quantize_rows"]


def fake_quantize_rows(
    x: Tensor,
    *,
    num_bits: int,
    clip_ratio: ClipRatio = None,
    of_weight: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Quantize and dequantize each row of x [..., n], floating, with a dynamic scale; returns its shape and dtype.

    The clip ratio in (0, 1] broadcasts to [..., 1]. Scales of a weight are rounded to the stored dtype. Gradients
    towards x and the ratio are those of `core.qparams`. The backend is "reference", "cpu", "triton", or "auto": Triton
    where it can run on a GPU, cpu on the CPU. Compiled graphs have the operations of the reference.

    Raises:
        InvalidInputError: If there is no such backend, or it cannot run here.
    """
    run = qparams.fake_quantize_rows if torch.compiler.is_compiling() else choose_backend(backend, x, BACKENDS)
    return run(x, num_bits=num_bits, clip_ratio=clip_ratio, of_weight=of_weight)


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
