"""Per-token dynamic quantization, the specification (S²Q-VDiT, eq. 1).

    x_int = clamp(round(x / Δ), -2^(N-1), 2^(N-1) - 1),    Δ = clip_ratio · max over the token of |x| / (2^(N-1) - 1)

Shapes: `I` in features; every leading dimension counts tokens.
"""

from torch import Tensor

from s2q.core.qparams import ClipRatio, quantize, token_scale


def quantize_per_token(x: Tensor, *, num_bits: int, clip_ratio: ClipRatio = None) -> tuple[Tensor, Tensor]:
    """Quantize each token with a scale of its own, computed from it.

    Args:
        x: [..., I], any floating dtype; computed in fp32.
        num_bits: N, 2 to 8.
        clip_ratio: Factor in (0, 1] on the token's largest magnitude: a float, or a tensor that broadcasts to [..., 1].

    Returns:
        codes: int8 [..., I].
        scale: fp32 [..., 1], never 0; an all-zero token has scale 1 and codes 0. A token with a NaN has scale NaN.
    """
    scale = token_scale(x, num_bits=num_bits, clip_ratio=clip_ratio)
    return quantize(x, scale, num_bits=num_bits), scale
