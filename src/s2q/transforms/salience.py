"""Salience of the channels of an input over timesteps: what a channel scale is computed from.

The largest magnitude over all timesteps, or the mean over timesteps weighted by how little a timestep agrees with the
weight on which channels are large (Spearman's ρ-guided salience calibration of PTQ4DiT; Wu et al., 2024):

    s = Σ_t η_t s⁽ᵗ⁾,    η_t = exp(-ρ_t) / Σ_τ exp(-ρ_τ),    ρ_t = Spearman's ρ of s⁽ᵗ⁾ and s(W) over channels

A channel scale can move what is large from the input to the weight where the weight is small there; timesteps in which
that is so count for more. With α = 0.5, SmoothQuant's s is PTQ4DiT's balance: both sides get √(s(x) · s(W)).

Example: s(W) = [1, 2, 3] and two timesteps, [4, 5, 6] with ρ = 1 and [6, 5, 4] with ρ = -1: η = [e⁻¹, e] / (e⁻¹ + e) =
[0.119, 0.881], and s = [5.762, 5, 4.238].

Shapes: `T` timesteps, `I` in features.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from s2q.common.errors import InvalidInputError


def largest_salience(input_amax: Tensor, weight_amax: Tensor) -> Tensor:
    """Return the largest magnitude [I] of each channel over all timesteps, from max|x_j| of each, [T, I]."""
    return input_amax.amax(dim=0)


def spearman_salience(input_amax: Tensor, weight_amax: Tensor) -> Tensor:
    """Return the mean [I] in fp64 over timesteps, weighted by `spearman_weights`, which has the arguments."""
    return spearman_weights(input_amax, weight_amax) @ input_amax.double()


def spearman_weights(input_amax: Tensor, weight_amax: Tensor) -> Tensor:
    """Compute η, fp64 [T], from max|x_j| [T, I] and max|w_j| [I] over all linears that read the input, both ≥ 0.

    Equal values share the mean of their ranks. Where all channels of one side are equal there is no order to agree
    with, and ρ counts as 0.

    Raises:
        InvalidInputError: If shapes do not fit, or a value is NaN or infinite.
    """
    if input_amax.ndim != 2 or input_amax.shape[0] == 0 or input_amax.shape[1:] != weight_amax.shape:
        raise InvalidInputError(
            f"salience: got maxima of shape {list(input_amax.shape)} and {list(weight_amax.shape)}; "
            "expected [T, I] and [I]"
        )
    if not bool(input_amax.isfinite().all() and weight_amax.isfinite().all()):
        raise InvalidInputError("salience: maxima contain NaN or infinite values")
    correlations = [_spearman(row.numpy(force=True), weight_amax.numpy(force=True)) for row in input_amax]
    return torch.softmax(-torch.tensor(correlations, dtype=torch.float64, device=input_amax.device), dim=0)


def _spearman(first: np.ndarray, second: np.ndarray) -> float:
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic)


SALIENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"max": largest_salience, "spearman": spearman_salience}
"""Reductions of per-timestep maxima to one per channel, by name."""
