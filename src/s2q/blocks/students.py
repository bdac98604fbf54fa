"""The student of a block as it starts: shift, transform, low-rank branch, clips and rounding of the recipe.

Where the recipe searches for α, linears that share an input are made with every α of a grid, and those stay whose
outputs together are nearest to the exact ones in squares, on tokens of the samples: weights rounded to nearest, inputs
quantized, the low-rank branch added, as SVDQuant (Li et al., 2024) judges its own.

Legend: `I/O` in/out features.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from s2q.blocks.task import BlockWork
from s2q.calibration.input_statistics import InputStatistics
from s2q.common.seeds import derive_seed
from s2q.core.schemes import LinearScheme
from s2q.nn import PACKED_DTYPES, Estimator, LearnableClip, StudentInput, StudentLinear
from s2q.recipes.schema import Recipe
from s2q.rounding import LearnedRounding
from s2q.transforms import (
    ROTATIONS,
    SALIENCES,
    SEARCH,
    Compose,
    KroneckerTransform,
    SmoothScale,
    Transform,
    principal_directions,
    smooth_scale,
    weight_directions,
)

ALPHAS = tuple(step / 10 for step in range(11))
"""What a search for α tries."""

logger = logging.getLogger(__name__)


def make_students(
    work: BlockWork, group: tuple[str, ...], *, statistics: InputStatistics | None = None
) -> dict[str, StudentLinear]:
    """Make the students of linears that share an input.

    Args:
        work: The block and the recipe.
        group: Names of the linears inside the block.
        statistics: Of their input; None for recipes that need no samples.

    Returns:
        Student by name, where the teacher's linears are.
    """
    alpha = work.task.recipe.transforms.alpha
    if alpha == SEARCH:
        assert statistics is not None
        alpha = _best_alpha(work, group, statistics)
        logger.debug("%s: alpha=%.1f", work.task.linears[group[0]], alpha)
    return _students(work, group, statistics, alpha=float(alpha))


@torch.no_grad()
def _best_alpha(work: BlockWork, group: tuple[str, ...], statistics: InputStatistics) -> float:
    """The α with the smallest squared error of the group's outputs; the smaller one of two that are as good."""
    rows = statistics.rows()
    exact = {name: work.teacher.get_submodule(name)(rows) for name in group}
    errors = {}
    for alpha in ALPHAS:
        layers = _students(work, group, statistics, alpha=alpha)
        errors[alpha] = sum(float((layers[name](rows) - exact[name]).double().square().sum()) for name in group)
    return min(errors, key=errors.__getitem__)


def _students(
    work: BlockWork, group: tuple[str, ...], statistics: InputStatistics | None, *, alpha: float
) -> dict[str, StudentLinear]:
    """The students of linears that share an input, by name inside the block."""
    recipe, seed, linears = work.task.recipe, work.task.block_seed, [work.teacher.get_submodule(name) for name in group]
    scheme, weights = work.scheme(group[0]), [linear.weight for linear in linears]
    shift = None if statistics is None else _shift(statistics, linears, recipe)
    amax = None if statistics is None else statistics.amax(shift)
    transform = _transform(weights, recipe, amax=amax, alpha=alpha, seed=derive_seed(seed, "rotation", group[0]))
    basis = None
    if statistics is not None:
        if rank := _rank(linears, recipe):
            if recipe.transforms.deflates:
                basis = _input_basis(statistics, shift, transform, rank=rank)
            else:
                basis = _weight_basis(weights, transform, rank=rank)
    source = StudentInput(
        scheme.activation,
        shift=shift,
        transform=transform,
        low_rank_basis=basis,
        low_rank_from=recipe.transforms.low_rank_from,
        clip=_clip(scheme, recipe),
    ).to(weights[0].device)
    layers = {}
    for name, linear in zip(group, linears, strict=True):
        estimator = None
        if recipe.transforms.estimator:
            frames = None if name in work.task.family.text_linears else work.frames
            estimator = Estimator(
                linear.in_features, linear.out_features, frames=frames, seed=derive_seed(seed, "estimator", name)
            ).to(weights[0].device)
        if recipe.clip.weights:
            layer = StudentLinear.with_clip(linear, scheme=work.scheme(name), source=source, estimator=estimator)
        else:
            layer = StudentLinear(linear, scheme=work.scheme(name), source=source, estimator=estimator)
        if recipe.rounding.learned:
            layer.rounding = LearnedRounding(layer.folded_weight(), work.scheme(name).weight)
        layers[name] = layer
    return layers


def _shift(statistics: InputStatistics, linears: Sequence[nn.Module], recipe: Recipe) -> Tensor | None:
    """The mean of the input, where the biases of its linears can make up for it."""
    if recipe.transforms.shift != "mean":
        return None
    biased = {linear.bias is not None for linear in linears}
    assert len(biased) == 1, "of linears that share an input, some have a bias and some do not"
    return statistics.mean() if biased == {True} else None


def _transform(
    weights: Sequence[Tensor], recipe: Recipe, *, amax: Tensor | None, alpha: float, seed: int
) -> Transform | None:
    """The recipe's scale and rotation, on the device of the weights; `amax` [T, I] is None without samples."""
    transform = _rotation(weights[0].shape[1], recipe, seed=seed)
    if amax is not None:
        transform = _scaled(transform, amax, weights, recipe, alpha=alpha)
    return None if transform is None else transform.to(weights[0].device)


def _rotation(in_features: int, recipe: Recipe, *, seed: int) -> Transform | None:
    settings = recipe.transforms
    if settings.rotation == "identity":
        return None
    if settings.rotation == "kronecker":
        return KroneckerTransform.build(in_features, seed=seed, start=settings.start)
    return ROTATIONS[settings.rotation](in_features, seed=seed)


def _scaled(
    rotation: Transform | None, amax: Tensor, weights: Sequence[Tensor], recipe: Recipe, *, alpha: float
) -> Transform | None:
    """Put the channel scale of the recipe, if it has one, before the rotation.

    It is made from the largest magnitudes of the input in each timestep, [T, I].
    """
    settings = recipe.transforms
    if settings.scale == "none":
        return rotation
    largest = torch.stack([weight.abs().amax(dim=0).float() for weight in weights]).amax(dim=0)
    salience = SALIENCES[settings.salience](amax.cpu(), largest.cpu())
    s = smooth_scale(salience, largest.cpu(), alpha=alpha)
    scale = SmoothScale(s, learnable=settings.learn_scale)
    return scale if rotation is None else Compose(scale, rotation)


def _rank(linears: Sequence[nn.Module], recipe: Recipe) -> int | None:
    """Rank of the low-rank branch before linears that share an input."""
    ranks = {recipe.transforms.rank(*reversed(linear.weight.shape)) for linear in linears}
    assert len(ranks) == 1, f"the sizes of linears that share an input ask for ranks {sorted(map(str, ranks))}"
    return ranks.pop()


def _input_basis(
    statistics: InputStatistics, shift: Tensor | None, transform: Transform | None, *, rank: int
) -> Tensor:
    """The directions of the shifted and scaled input that go through the low-rank branch, [I, r]."""
    moment = statistics.second_moment(shift)
    if transform is not None:
        moment = transform.scaled(transform.scaled(moment).t())
    return _as_stored(principal_directions(moment.detach(), rank))


def _weight_basis(weights: Sequence[Tensor], transform: Transform | None, *, rank: int) -> Tensor:
    """The directions of the scaled weights that go through the low-rank branch, [I, r]."""
    if transform is not None:
        weights = [transform.unscaled(weight) for weight in weights]
    return _as_stored(weight_directions([weight.detach() for weight in weights], rank))


def _as_stored(basis: Tensor) -> Tensor:
    return basis.to(PACKED_DTYPES["low_rank_basis"]).float()


def _clip(scheme: LinearScheme, recipe: Recipe) -> nn.Module | None:
    if scheme.activation is None:
        return None
    if recipe.clip.activations:
        return LearnableClip((1,))
    return None if recipe.clip.constant is None else _ConstantClip(recipe.clip.constant)


class _ConstantClip(nn.Module):
    """A constant ratio in place of `LearnableClip`."""

    ratio: Tensor

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.register_buffer("ratio", torch.tensor([ratio], dtype=torch.float32))

    def forward(self) -> Tensor:
        return self.ratio
