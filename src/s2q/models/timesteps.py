"""Inputs of adaLN linears that depend on the timestep alone, known without a sample."""

import copy
import functools
import operator

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

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
    timesteps = torch.arange(0.0, _TIMESTEPS, _STEP)
    rows = []
    for projection, embedding, constant in family_of(transformer).timestep_embeddings:
        module = getattr(transformer, embedding, None)
        if module is not None:
            values = timesteps if constant is None else torch.tensor([constant])
            in_float = copy.deepcopy(module).to("cpu", torch.float32)
            rows.append(in_float(getattr(transformer, projection)(values)))
    return silu(functools.reduce(operator.add, rows)).mean(dim=0) if rows else None


def timestep_parameters(transformer: nn.Module) -> list[str]:
    """Return the names of the parameters that `mean_timestep_row` is computed from; empty where that returns None."""
    embeddings = tuple(f"{embedding}." for _, embedding, _ in family_of(transformer).timestep_embeddings)
    return [name for name, _ in transformer.named_parameters() if name.startswith(embeddings)]
