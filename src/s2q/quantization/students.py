"""The student of a block as it starts: shift, transform, low-rank branch and clips of the recipe before its linears.

Legend: `I/O` in/out features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from s2q.core.schemes import LinearScheme
from s2q.core.seeds import derive_seed
from s2q.nn import PACKED_DTYPES, Estimator, LearnableClip, StudentInput, StudentLinear, replace_module
from s2q.quantization.statistics import InputStatistics
from s2q.quantization.work import BlockWork
from s2q.recipes import Recipe
from s2q.transforms import (
    ROTATIONS,
    Compose,
    KroneckerTransform,
    SmoothScale,
    Transform,
    principal_directions,
    smooth_scale,
)


def put_students(
    student: nn.Module, work: BlockWork, group: tuple[str, ...], statistics: InputStatistics, *, seed: int
) -> None:
    """Replace linears that share an input by students, in place.

    Args:
        student: A copy of the block.
        work: The block and the recipe.
        group: Names of the linears inside the block.
        statistics: Of their input.
        seed: Of a random rotation, and of estimators.
    """
    recipe, linears = work.recipe, [work.teacher.get_submodule(name) for name in group]
    scheme = work.scheme(group[0])
    device = statistics.low.device
    shift = _shift(statistics, linears, recipe)
    transform = _transform(statistics.amax(shift), [one.weight for one in linears], recipe, seed=seed)
    if transform is not None:
        transform.to(device)
    basis = _basis(statistics, shift, transform, rank=_rank(linears, recipe))
    clip = _clip(scheme, recipe)
    source = StudentInput(
        scheme.activation,
        shift=shift,
        transform=transform,
        low_rank_basis=basis,
        clip=None if clip is None else clip.to(device),
    )
    for name, linear in zip(group, linears, strict=True):
        estimator = None
        if recipe.transforms.estimator:
            frames = None if name in work.text_linears else work.frames
            estimator = Estimator(
                linear.in_features, linear.out_features, frames=frames, seed=derive_seed(seed, "estimator", name)
            ).to(device)
        if recipe.clip.weights:
            layer = StudentLinear.with_clip(
                linear, scheme=work.scheme(name), source=source, start=recipe.clip.start, estimator=estimator
            )
        else:
            layer = StudentLinear(linear, scheme=work.scheme(name), source=source, estimator=estimator)
        replace_module(student, name, layer)


def _shift(statistics: InputStatistics, linears: Sequence[nn.Module], recipe: Recipe) -> Tensor | None:
    """The mean of the input, where the biases of its linears can make up for it."""
    if recipe.transforms.shift != "mean":
        return None
    biased = {linear.bias is not None for linear in linears}
    assert len(biased) == 1, "of linears that share an input, some have a bias and some do not"
    return statistics.mean() if biased == {True} else None


def _transform(amax: Tensor, weights: Sequence[Tensor], recipe: Recipe, *, seed: int) -> Transform | None:
    settings = recipe.transforms
    in_features = amax.shape[0]
    rotation: Transform | None = None
    if settings.rotation == "kronecker":
        rotation = KroneckerTransform.build(in_features, seed=seed, start=settings.start)
    elif settings.rotation != "identity":
        rotation = ROTATIONS[settings.rotation](in_features, seed=seed)
    if settings.scale == "none":
        return rotation
    largest = torch.stack([weight.abs().amax(dim=0).float() for weight in weights]).amax(dim=0)
    s = smooth_scale(amax.cpu(), largest.cpu(), alpha=settings.alpha)
    scale = SmoothScale(s, learnable=settings.learn_scale)
    return scale if rotation is None else Compose(scale, rotation)


def _rank(linears: Sequence[nn.Module], recipe: Recipe) -> int | None:
    """Rank of the low-rank branch before linears that share an input."""
    ranks = {recipe.transforms.rank(*reversed(linear.weight.shape)) for linear in linears}
    assert len(ranks) == 1, f"the sizes of linears that share an input ask for ranks {sorted(map(str, ranks))}"
    return ranks.pop()


def _basis(
    statistics: InputStatistics, shift: Tensor | None, transform: Transform | None, *, rank: int | None
) -> Tensor | None:
    """The directions of the shifted and scaled input that go through the low-rank branch, [I, r]."""
    if rank is None:
        return None
    moment = statistics.second_moment(shift)
    if transform is not None:
        moment = transform.scaled(transform.scaled(moment).t())
    return principal_directions(moment.detach(), rank).to(PACKED_DTYPES["low_rank_basis"]).float()


def _clip(scheme: LinearScheme, recipe: Recipe) -> nn.Module | None:
    if scheme.activation is None:
        return None
    if recipe.clip.activations:
        return LearnableClip((1,), start=recipe.clip.start)
    return None if recipe.clip.constant is None else _ConstantClip(recipe.clip.constant)


class _ConstantClip(nn.Module):
    """A ratio that is not learned; stands in for `LearnableClip`."""

    ratio: Tensor

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.register_buffer("ratio", torch.tensor([ratio], dtype=torch.float32))

    def forward(self) -> Tensor:
        return self.ratio
