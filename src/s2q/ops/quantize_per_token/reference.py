"""Per-token dynamic quantization, the specification (S²Q-VDiT, eq. 1).

    x_int = clamp(round(x / Δ), -2^(N-1), 2^(N-1) - 1),    Δ = clip_ratio · max over the token of |x| / (2^(N-1) - 1)

Shapes: `I` in features; every leading dimension counts tokens.
"""

from torch import Tensor

from s2q.core.qparams import ClipRatio, quantize, token_scale


def quantize_per_token(x: Tensor, *, num_bits: int, clip_ratio: ClipRatio = None) -> tuple[Tensor, Tensor]:
    """Quantize each token of x [..., I] with a scale of its own, computed from it in fp32.

    The clip ratio in (0, 1] broadcasts to [..., 1].

    Returns:
        codes: int8 [..., I].
        scale: fp32 [..., 1], never 0; an all-zero token has scale 1 and codes 0. A token with a NaN has scale NaN.
    """
    scale = token_scale(x, num_bits=num_bits, clip_ratio=clip_ratio)
    return quantize(x, scale, num_bits=num_bits), scale
