"""Tokens in int8 levels, the specification.

    Δ = unit · clip_ratio · √(mean x²),    v = the level nearest to x / Δ

Example: levels [-127, -38, 38, 127] of 2 bits with unit 1 / 84; x = [3, -1, 1, -3] has the root mean square 2.236, so
Δ = 0.0266, x / Δ = [112.7, -37.6, 37.6, -112.7] and v = [127, -38, 38, -127].

Shapes: `M` tokens, `I` features.
"""

from torch import Tensor

from s2q.core.qparams import quantize, token_scale_of_levels


def token_levels(x: Tensor, levels: Tensor, clip_ratio: Tensor | None = None, *, unit: float) -> tuple[Tensor, Tensor]:
    """Quantize each token to the nearest levels.

    Args:
        x: [M, I], floating, transformed.
        levels: fp32 [2^N], rising whole numbers of at most 127 in magnitude (`core.codebook.levels_of`).
        clip_ratio: Factor in (0, 1], broadcasts to [M, 1].
        unit: Of the levels in root mean squares (`core.codebook.level_unit`).

    Returns:
        values: v, int8 [M, I].
        token_scale: Δ, fp32 [M, 1]; 0 of a token of zeros, NaN of one with a NaN.
    """
    scale = token_scale_of_levels(x, unit=unit, clip_ratio=clip_ratio)
    codes = quantize(x, scale, num_bits=len(levels).bit_length() - 1, levels=levels)
    return levels.to(codes.dtype)[codes.int() + len(levels) // 2], scale
