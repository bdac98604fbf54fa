"""Learnable channel scale, started as in SmoothQuant (Xiao et al., 2023, eq. 4).

    T = diag(1/s),    s_j = max|x_j|^α / max|w_j|^(1-α),    log s is what is learned

so that x loses its outlier channels to the weight, which is quantized per output channel. Every positive multiple of s
gives the same quantized product: per-token and per-channel scales take it up.

Example, α = 0.5: max|x| = [4, 1], max|w| = [1, 4] gives s = [2, 0.5]; x is divided by s and W multiplied: both maxima
become [2, 2].

Shapes: `I` in features.
"""

import torch
from torch import Tensor, nn

from s2q.common.errors import InvalidInputError
from s2q.transforms.base import Factors, Transform

_FLOOR = 1e-5  # of the largest weight maximum: a channel that no weight reads gets a large, finite s


def smooth_scale(input_amax: Tensor, weight_amax: Tensor, *, alpha: float = 0.5) -> Tensor:
    """Compute SmoothQuant's s, fp64 [I], from the largest magnitudes [I] of each channel of input and weights.

    A channel that is zero in all of the input gets the geometric mean of the others (nothing is known about it, and the
    formula would multiply it by infinity); all channels zero gives ones. A weight maximum below 1e-5 of the largest one
    counts as that, so that a channel which no weight reads is scaled away from x and s stays finite.

    Raises:
        InvalidInputError: If shapes differ, a value is negative, NaN or infinite, or α is not 0 to 1.
    """
    if not 0 <= alpha <= 1:
        raise InvalidInputError(f"smooth scale: alpha={alpha}; expected 0 to 1")
    if input_amax.ndim != 1 or input_amax.shape != weight_amax.shape:
        raise InvalidInputError(
            f"smooth scale: got maxima of shape {list(input_amax.shape)} and {list(weight_amax.shape)}; expected [I]"
        )
    for name, amax in (("input", input_amax), ("weight", weight_amax)):
        if not bool((amax.isfinite() & (amax >= 0)).all()):
            raise InvalidInputError(f"smooth scale: {name} maxima contain NaN, infinite or negative values")
    x_amax, w_amax = input_amax.double(), weight_amax.double()
    largest = float(w_amax.max())
    w_amax = w_amax.clamp_min(largest * _FLOOR) if largest > 0 else torch.ones_like(w_amax)
    active = x_amax > 0
    log_s = alpha * torch.where(active, x_amax, 1.0).log() - (1 - alpha) * w_amax.log()
    if not bool(active.any()):
        return torch.ones_like(x_amax)
    return torch.where(active, log_s, log_s[active].mean()).exp()


class SmoothScale(Transform):
    """T = diag(1/s) with the parameter log s, fp32 [I]; InvalidInputError if s is not positive and finite."""

    def __init__(self, s: Tensor, *, learnable: bool = True) -> None:
        super().__init__(s.shape[0])
        if s.ndim != 1 or not bool((s.isfinite() & (s > 0)).all()):
            raise InvalidInputError("SmoothScale: expected s [I], positive and finite; got another shape or values")
        self.log_s = nn.Parameter(s.detach().double().log().float(), requires_grad=learnable)

    def factors(self, dtype: torch.dtype, *, inverse_transpose: bool = False) -> Factors:
        """Return the factors of T or T⁻ᵀ; see `Transform.factors`."""
        log_s = self.log_s.to(dtype)
        return Factors(scale=(log_s if inverse_transpose else -log_s).exp())
