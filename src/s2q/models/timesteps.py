"""Inputs of adaLN linears that depend on the timestep alone, known without a sample."""

import torch
from torch import Tensor, nn

from s2q.models import family_of

_TIMESTEPS = 1000
_STEP = 10


@torch.no_grad()
def mean_timestep_row(transformer: nn.Module) -> Tensor | None:
    """Return the mean, over timesteps from 0 to 1000, of what the adaLN linears of a transformer read.

    Returns:
        [in_features], float32, on the CPU; None for families whose adaLN reads pooled text or guidance too, or which
        have no adaLN linears.
    """
    rows = family_of(transformer).timestep_rows
    if rows is None:
        return None
    return rows(transformer, torch.arange(0.0, _TIMESTEPS, _STEP)).mean(dim=0)
