"""Observations of a block on its samples: targets, token weights, statistics of the inputs of its linears."""

import functools
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from s2q.calibration.input_statistics import InputStatistics
from s2q.calibration.samples import BlockSamples
from s2q.common.hooks import capture_inputs
from s2q.distillation.token_importance import capture_column_sums, token_weights
from s2q.models import Family
from s2q.planning.resolve import LinearPlan
from s2q.recipes.schema import Recipe
from s2q.transforms import SEARCH

SEARCHED_ROWS = 2048
"""Tokens of all samples together that a search for α judges by."""


@torch.no_grad()
def observe(
    teacher: nn.Module,
    samples: BlockSamples,
    groups: Sequence[tuple[LinearPlan, ...]],
    *,
    recipe: Recipe,
    family: Family,
) -> dict[tuple[LinearPlan, ...], InputStatistics]:
    """Store targets and token weights of every sample; return the statistics of the input of each group of linears."""
    loss, settings = recipe.loss, recipe.transforms
    moments = settings.low_rank > 0 and settings.low_rank_from != "weight"
    kept = -(-SEARCHED_ROWS // len(samples)) if settings.alpha == SEARCH else 0
    device = next(teacher.parameters()).device
    statistics = {group: InputStatistics(group[0].in_features, device, moments=moments, kept=kept) for group in groups}
    for index in range(len(samples)):
        timestep = samples.stream.steps[index]
        listeners = {
            group[0].inner_name: functools.partial(of_group.add, timestep=timestep)
            for group, of_group in statistics.items()
        }
        weighted = loss.weighting == "attention"
        attention = teacher.get_submodule(family.attention)
        call = functools.partial(teacher, **samples.inputs(index))
        with (
            capture_inputs(teacher, listeners),
            capture_column_sums(attention) if weighted else nullcontext() as captured,
        ):
            outputs = call()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        samples.stream.check(outputs, sample=index, module=teacher, run=call)
        stored = dict(zip(samples.streams, outputs, strict=True))
        if captured is not None:
            lengths = [stored[name].shape[1] for name in family.joint_order]
            sums = captured.joined()
            left_out = sum(lengths) - sums.shape[1]  # text at the end that a prompt does not fill gets no attention
            assert left_out == 0 or (left_out > 0 and family.joint_order[-1] == "encoder_hidden_states"), left_out
            weights = token_weights(F.pad(sums, (0, left_out)), lambda_min=loss.lambda_min, lambda_max=loss.lambda_max)
            by_stream = dict(zip(family.joint_order, weights.split(lengths, dim=1), strict=True))
            for name, output in zip(samples.streams, outputs, strict=True):
                stored[f"weights.{name}"] = by_stream.get(name, torch.ones_like(output[..., 0]))
        samples.targets.put(index, stored)
    return statistics
