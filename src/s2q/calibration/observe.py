"""Observations of a block on its samples: targets, token weights, spread of attention, statistics of inputs."""

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2q.calibration.input_statistics import InputStatistics
from s2q.calibration.samples import BlockSamples
from s2q.common.hooks import capture_inputs
from s2q.distillation.attention_profile import AttentionProfile, ImportanceMap
from s2q.distillation.token_importance import capture_column_sums, token_weights
from s2q.models import Family
from s2q.planning.resolve import LinearPlan
from s2q.recipes.schema import Recipe
from s2q.transforms import SEARCH

SEARCHED_ROWS = 2048
"""Tokens of all samples together that a search for α judges by."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Statistics and attention of a block on its samples.

    Attributes:
        statistics: Of the input of each group of linears that share one.
        attention: The spread of its attention; None for recipes that do not weight tokens by it.
    """

    statistics: dict[tuple[LinearPlan, ...], InputStatistics]
    attention: AttentionProfile | None


@torch.no_grad()
def observe(
    teacher: nn.Module,
    samples: BlockSamples,
    groups: Sequence[tuple[LinearPlan, ...]],
    *,
    recipe: Recipe,
    family: Family,
) -> Observation:
    """Store targets and token weights of every sample; return statistics of each group of linears, and of attention."""
    loss, settings = recipe.loss, recipe.transforms
    moments = settings.low_rank > 0 and settings.low_rank_from != "weight"
    kept = -(-SEARCHED_ROWS // len(samples)) if settings.alpha == SEARCH else 0
    device = next(teacher.parameters()).device
    statistics = {group: InputStatistics(group[0].in_features, device, moments=moments, kept=kept) for group in groups}
    weighted = loss.weighting == "attention"
    profile = AttentionProfile() if weighted else None
    mapped = max(range(len(samples)), key=lambda index: samples.stream.steps[index])
    for index in range(len(samples)):
        timestep = samples.stream.steps[index]
        listeners = {
            group[0].inner_name: functools.partial(of_group.add, timestep=timestep)
            for group, of_group in statistics.items()
        }
        attention = teacher.get_submodule(family.attention)
        call = functools.partial(teacher, **samples.inputs(index))
        with (
            capture_inputs(teacher, listeners),
            capture_column_sums(attention, linear=family.linear_attention) if weighted else nullcontext() as captured,
        ):
            outputs = call()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        samples.stream.check(outputs, sample=index, module=teacher, run=call)
        stored = dict(zip(samples.streams, outputs, strict=True))
        if captured is not None:
            assert profile is not None
            lengths = [stored[name].shape[1] for name in family.joint_order]
            sums = captured.joined()
            left_out = sum(lengths) - sums.shape[1]  # text at the end that a prompt does not fill gets no attention
            names = [family.block_argument(name) for name in ("hidden_states", "encoder_hidden_states")]
            assert left_out == 0 or (left_out > 0 and family.joint_order[-1] == names[1]), left_out
            padded = F.pad(sums, (0, left_out))
            weights = token_weights(padded, lambda_min=loss.lambda_min, lambda_max=loss.lambda_max)
            by_stream = dict(zip(family.joint_order, weights.split(lengths, dim=1), strict=True))
            video, text = (_place(name, family.joint_order, lengths) for name in names)
            if family.is_packed:
                video, text = _packed_places(samples, index)
            profile.add(sums, text=text)
            if index == mapped:
                profile.map = _importance_map(padded[0, video], samples, index)
            for name, output in zip(samples.streams, outputs, strict=True):
                stored[f"weights.{name}"] = by_stream.get(name, torch.ones_like(output[..., 0]))
        samples.targets.put(index, stored)
    return Observation(statistics=statistics, attention=profile)


def _place(stream: str, order: Sequence[str], lengths: Sequence[int]) -> slice:
    """Place of the tokens of a stream in a joint sequence; an empty slice if they are not in it."""
    if stream not in order:
        return slice(0, 0)
    index = list(order).index(stream)
    return slice(sum(lengths[:index]), sum(lengths[: index + 1]))


def _packed_places(samples: BlockSamples, index: int) -> tuple[slice, slice]:
    """Places of the video and of the text in a packed sequence, [text, sound, video]."""
    grid, text = samples.stream.video_grid(index), samples.stream.text_tokens(index)
    return slice(None) if grid is None else slice(grid.text_tokens, None), slice(0, text)


def _importance_map(sums: Tensor, samples: BlockSamples, index: int) -> ImportanceMap | None:
    grid = samples.stream.video_grid(index)
    if grid is None or grid.tokens != len(sums):
        return None
    return ImportanceMap.of(sums, grid, sample=samples.stream.names[index])
