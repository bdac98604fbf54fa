"""Scales, codes and fake quantization: symmetric uniform quantization (S²Q-VDiT, eq. 1), and that with a codebook.

    x_int = clamp(round(x / Δ), -2^(N-1), 2^(N-1) - 1),    Δ = clip_ratio · max|x| / (2^(N-1) - 1)

Rounding is half to even. With levels l that are not uniform (`core.codebook`), x_int is the code whose level is nearest
to x / Δ and represents l · Δ, and Δ = clip_ratio · √(mean x²), or that of `core.fp4`. All of it is computed in fp32
whatever the input's dtype, and everything that takes floating point input is differentiable (straight-through for the
rounding), towards the clip ratio as well.

Example, N = 4: x = [1.4, -0.7, 0.2] has max 1.4, so Δ = 0.2 and the codes are [7, -4, 1] (-3.5 goes to the even -4).

Shapes: `O` out features, `I` in features, `G` groups. A weight's scale is [O] (per channel), [O, G] (per group) or [1]
(per tensor); the functions on weights tell them apart by their shape.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s2q.common.errors import InvalidInputError
from s2q.core.codebook import group_levels, level_unit, levels_of, nearest_level
from s2q.core.fp4 import block_scale, exact_in_bf16
from s2q.core.schemes import NVFP4, UNIFORM, PerChannel, PerGroup, QuantScheme, num_groups
from s2q.core.stored_form import stored_values

ClipRatio = float | Tensor | None


@dataclass(frozen=True, kw_only=True)
class RoundedWeight:
    """A rounded weight: codes int8 [O, I], and scale fp32 [O] (per channel) or [O, G] (per group).

    With a table, scale is [O] and `group_scale` int8 [O, G] (`core.codebook`); None without.
    """

    codes: Tensor
    scale: Tensor
    group_scale: Tensor | None = None


def scale_from_amax(amax: Tensor, *, num_bits: int) -> Tensor:
    """Turn the largest magnitude, any shape, into a scale of that shape in fp32, Δ = amax / (2^(N-1) - 1).

    It is never 0: where amax is 0 (or so small that Δ underflows) the scale is 1, and the codes are then 0. NaN and
    infinity do not change.
    """
    scale = amax.float() / _qmax(num_bits)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def weight_scale(weight: Tensor, scheme: QuantScheme, *, clip_ratio: ClipRatio = None) -> Tensor:
    """Compute the static scale of a weight [O, I], fp32 [O] (PerChannel) or [O, G] (PerGroup).

    Rounded to the stored dtype (bfloat16). The clip ratio in (0, 1] broadcasts to it. 0 where all values are 0 and
    the levels are not uniform. The two scales of a table come from `s2q.rounding.table`.
    """
    assert not scheme.has_table, scheme
    match scheme.granularity:
        case PerChannel():
            values = weight
        case PerGroup():
            values = _grouped(weight, num_groups(scheme, weight.shape[1]))
        case _:
            raise InvalidInputError(f"weight scheme {scheme}; expected PerChannel or PerGroup")
    by_amax = scheme.levels == UNIFORM or scheme.is_fp4
    if by_amax:
        size = _largest_magnitude(values.float()).squeeze(-1)
    else:
        size = _root_mean_square(values).squeeze(-1) * level_unit(scheme, weight.shape[1])
    if clip_ratio is not None:
        size = size * clip_ratio
    if scheme.is_fp4:
        return block_scale(exact_in_bf16(size) if scheme.levels == NVFP4 else size, scheme)
    scale = scale_from_amax(size, num_bits=scheme.num_bits) if by_amax else size
    return _stored(scale)


def _stored(scale: Tensor) -> Tensor:
    """Round the scale of a weight to the stored dtype; 1 where it underflows."""
    stored = stored_values("weight_scale", scale)
    return torch.where((stored == 0) & (scale != 0), 1.0, stored)


def token_scale(x: Tensor, *, num_bits: int, clip_ratio: ClipRatio = None) -> Tensor:
    """Compute the dynamic scale of each token, fp32 [..., 1], of x [..., I]; the clip ratio in (0, 1] broadcasts."""
    return token_scale_from_amax(_largest_magnitude(x), num_bits=num_bits, clip_ratio=clip_ratio)


def token_scale_from_amax(amax: Tensor, *, num_bits: int, clip_ratio: ClipRatio = None) -> Tensor:
    """Compute the dynamic scale of each token from its largest magnitude, both [..., 1]; see `token_scale`."""
    amax = amax.float()
    return scale_from_amax(amax if clip_ratio is None else amax * clip_ratio, num_bits=num_bits)


def token_scale_of_levels(x: Tensor, *, unit: float, clip_ratio: ClipRatio = None) -> Tensor:
    """Compute the dynamic scale of each token of x [..., I] for levels, fp32 [..., 1], by its root mean square.

    `unit` is that of the levels (`core.codebook.level_unit`). 0 where all of a token is 0.
    """
    return _root_mean_square(x) * (unit if clip_ratio is None else clip_ratio * unit)


def group_scale(grouped: Tensor, scheme: QuantScheme, *, clip_ratio: ClipRatio = None) -> Tensor:
    """Compute the dynamic scale of each group of x [..., G, I / G], fp32 [..., G], in a format of `core.fp4`."""
    amax = grouped.abs().amax(dim=-1)
    return block_scale(amax if clip_ratio is None else amax * clip_ratio, scheme)


def quantize(x: Tensor, scale: Tensor, *, num_bits: int, levels: Tensor | None = None) -> Tensor:
    """Round x to int8 codes (eq. 1), or to those of the nearest levels, fp32 [2^N]; the scale broadcasts to x."""
    if levels is not None:
        return (nearest_level(_over(x, scale), levels) - len(levels) // 2).to(torch.int8)
    return (x.float() / scale).round_().clamp_(*code_range(num_bits)).to(torch.int8)


def quantize_per_token(x: Tensor, *, num_bits: int, clip_ratio: ClipRatio = None) -> tuple[Tensor, Tensor]:
    """Quantize each token of x [..., I] with a dynamic scale, see `token_scale`.

    Returns:
        codes: int8 [..., I].
        scale: fp32 [..., 1], never 0; an all-zero token has scale 1 and codes 0. A token with a NaN has scale NaN.
    """
    scale = token_scale(x, num_bits=num_bits, clip_ratio=clip_ratio)
    return quantize(x, scale, num_bits=num_bits), scale


def code_range(num_bits: int) -> tuple[int, int]:
    """Return the smallest and the largest code, -2^(N-1) and 2^(N-1) - 1."""
    return -_qmax(num_bits) - 1, _qmax(num_bits)


def dequantize(codes: Tensor, scale: Tensor, *, levels: Tensor | None = None) -> Tensor:
    """Turn codes back into values, fp32 of their shape; the scale broadcasts to codes, levels are fp32 [2^N]."""
    values = codes.float() if levels is None else levels[codes.int() + len(levels) // 2]
    return values * scale


def quantize_weight(weight: Tensor, scale: Tensor, *, num_bits: int, levels: Tensor | None = None) -> Tensor:
    """Round a weight [O, I] to codes int8 [O, I]; scale fp32 [O] or [O, G], levels as `levels_of` returns them."""
    grouped, spread = align_scale(weight, scale)
    return quantize(grouped, spread, num_bits=num_bits, levels=levels).reshape(weight.shape)


def dequantize_weight(codes: Tensor, scale: Tensor, *, levels: Tensor | None = None) -> Tensor:
    """Turn the codes of a weight, int8 [O, I], back into values fp32 [O, I]; the inverse of `quantize_weight`."""
    grouped, spread = align_scale(codes, scale)
    return dequantize(grouped, spread, levels=levels).reshape(codes.shape)


def rounded_values(rounded: RoundedWeight, scheme: QuantScheme) -> Tensor:
    """Return the values of a rounded weight, fp32 [O, I]."""
    codes = rounded.codes
    if rounded.group_scale is None:
        return dequantize_weight(codes, rounded.scale, levels=levels_of(scheme, codes.shape[1], device=codes.device))
    levels = group_levels(rounded.group_scale)
    places = _grouped(codes, levels.shape[1]).long() + levels.shape[2] // 2
    return dequantize_weight(levels.gather(2, places).flatten(1), rounded.scale)


def fake_quantize(x: Tensor, scale: Tensor, *, num_bits: int, levels: Tensor | None = None) -> Tensor:
    """Quantize and dequantize at once, trainable; shape and dtype of x, to which the fp32 scale broadcasts.

    Gradients, with q = x / Δ: towards x, 1 within the range of the codes and 0 where the code is clamped; towards Δ,
    round(q) - q within the range and the clamped code outside (Esser et al., "Learned Step Size Quantization", 2020).
    With levels, the nearest level replaces round(q), and the range ends at the outermost ones.
    """
    if levels is not None:
        nearest: Tensor = _LevelSTE.apply(_over(x, scale).clamp(levels[0], levels[-1]), levels)  # type: ignore[no-untyped-call]
        return (nearest * scale).to(x.dtype)
    values: Tensor = _UniformSTE.apply(x.float(), scale, num_bits)  # type: ignore[no-untyped-call]
    return values.to(x.dtype)


def fake_quantize_rows(x: Tensor, *, num_bits: int, clip_ratio: ClipRatio = None, of_weight: bool = False) -> Tensor:
    """Quantize and dequantize each row of x [..., n] by its own `token_scale`, trainable; see `fake_quantize`.

    Scales of a weight are rounded to the stored dtype.
    """
    x = x.contiguous()  # sums of gradients are in the order of memory
    scale = token_scale(x, num_bits=num_bits, clip_ratio=clip_ratio)
    return fake_quantize(x, _stored(scale) if of_weight else scale, num_bits=num_bits)


def fake_quantize_weight(weight: Tensor, scale: Tensor, *, num_bits: int, levels: Tensor | None = None) -> Tensor:
    """Quantize and dequantize a weight [O, I] at once, trainable, with a scale [O] or [O, G]; see `fake_quantize`."""
    grouped, spread = align_scale(weight, scale)
    return fake_quantize(grouped, spread, num_bits=num_bits, levels=levels).reshape(weight.shape)


def align_scale(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Reshape a weight [O, I], or its codes, and its scale [O] or [O, G] so that they broadcast.

    Returns [O, I] with [O, 1], or [O, G, I / G] with [O, G, 1].
    """
    if scale.ndim == 2:
        assert weight.shape[1] % scale.shape[1] == 0, (weight.shape, scale.shape)
        return _grouped(weight, scale.shape[1]), scale.unsqueeze(2)
    return weight, scale.unsqueeze(1)


class _UniformSTE(torch.autograd.Function):
    """`fake_quantize` with uniform levels; x and scale are kept for the backward pass, which rounds once more.

    Masks are floating-point factors: a CPU compares and selects several times as slowly as it multiplies.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, num_bits: int) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.num_bits = num_bits
        return (x / scale).round_().clamp_(*code_range(num_bits)).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (x, scale), (grad,) = ctx.saved_tensors, grad_outputs
        ratio = x / scale
        rounded = ratio.round()
        codes = rounded.clamp(*code_range(ctx.num_bits))
        clamped = rounded.sub_(codes).abs_().clamp_(max=1)  # 1 where a code is clamped, else 0
        grad_x = torch.addcmul(grad, grad, clamped, value=-1)
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None
        slope = codes.sub_(ratio).addcmul_(ratio, clamped)
        return grad_x, slope.mul_(grad).sum_to_size(scale.shape), None


class _AbsMax(torch.autograd.Function):
    """max|x| over the last dimension, [..., 1]; the gradient is shared evenly by all values of that magnitude."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        amax: Tensor = x.abs().amax(dim=-1, keepdim=True)
        ctx.save_for_backward(x, amax)
        return amax

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        x, amax = ctx.saved_tensors
        share = x / torch.where(amax == 0, torch.ones_like(amax), amax)
        largest = share.abs().floor_()  # 1 at the largest magnitude, else 0
        count: Tensor = largest.sum(dim=-1, keepdim=True).clamp_(min=1)
        gradient: Tensor = largest.mul_(share).mul_(grad_outputs[0] / count)
        return gradient


class _LevelSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ratio: Tensor, levels: Tensor) -> Tensor:
        return levels.index_select(0, nearest_level(ratio, levels).flatten()).view(ratio.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


def _over(x: Tensor, scale: Tensor) -> Tensor:
    """Divide by the scale; where that is 0, all of x is 0 and stays so."""
    return x.float() / torch.where(scale == 0, torch.ones_like(scale), scale)


def _largest_magnitude(values: Tensor) -> Tensor:
    """max|x| of the last dimension, [..., 1], differentiable."""
    if torch.is_grad_enabled() and values.requires_grad:
        largest: Tensor = _AbsMax.apply(values)  # type: ignore[no-untyped-call]
        return largest
    return values.abs().amax(dim=-1, keepdim=True)


def _root_mean_square(values: Tensor) -> Tensor:
    """fp32 [..., 1]."""
    norm: Tensor = torch.linalg.vector_norm(values.float(), dim=-1, keepdim=True)
    return norm / math.sqrt(values.shape[-1])


def _grouped(weight: Tensor, groups: int) -> Tensor:
    return weight.reshape(weight.shape[0], groups, weight.shape[1] // groups)


def _qmax(num_bits: int) -> int:
    return int(2 ** (num_bits - 1)) - 1
