"""The student of a block as it starts: shift, transform, low-rank branch, clips and rounding of the recipe.

Where the recipe searches for α, linears that share an input are made with every α of a grid, and those stay whose
outputs together are nearest to the exact ones in squares, on tokens of the samples: weights rounded to nearest, inputs
quantized, the low-rank branch added, as SVDQuant (Li et al., 2024) judges its own.

Legend: `I/O` in/out features.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from s2q.blocks.task import BlockWork, Group
from s2q.calibration.input_statistics import InputStatistics
from s2q.common.errors import located
from s2q.common.seeds import derive_seed
from s2q.core.memo import memoization
from s2q.core.schemes import LinearScheme
from s2q.core.stored_form import stored_values
from s2q.nn import (
    Estimator,
    LearnableClip,
    StudentInput,
    StudentLinear,
    StudentRows,
    replace_module,
)
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
    Transforms,
    column_scale,
    principal_directions,
    smooth_scale,
    weight_directions,
)

ALPHAS = tuple(step / 10 for step in range(11))
"""Candidates of the search for α."""

logger = logging.getLogger(__name__)


def make_students(
    work: BlockWork, group: Group, *, statistics: InputStatistics | None = None
) -> list[StudentLinear | StudentRows]:
    """Make the students of linears that share an input, in their order, where the teacher's linears are."""
    alpha = work.task.recipe.transforms.alpha
    with located(group[0].name):
        if alpha == SEARCH:
            assert statistics is not None
            alpha = _best_alpha(work, group, statistics)
            logger.debug("%s: alpha=%.1f", group[0].name, alpha)
        return _students(work, group, statistics, alpha=float(alpha))


def put_students(block: nn.Module, work: BlockWork, group: Group, statistics: InputStatistics) -> None:
    """Replace linears that share an input by their students, in place."""
    for linear, student in zip(group, make_students(work, group, statistics=statistics), strict=True):
        replace_module(block, linear.inner_name, student)


def learns_transforms(recipe: Recipe) -> bool:
    """Whether transforms are rounded to their stored form after distillation, not when students are made."""
    return recipe.distillation is not None and not recipe.rounding.learned


def round_transforms(block: nn.Module, group: Group) -> None:
    """Give students that share an input, in place, their transform in its stored form."""
    first = group[0]
    source = block.get_submodule(first.inner_name).source
    if source.transform is not None:
        with located(first.name):
            source.transform = source.transform.rounded()


@torch.no_grad()
def _best_alpha(work: BlockWork, group: Group, statistics: InputStatistics) -> float:
    """The α with the smallest squared error of the group's outputs; the smaller one of two that are as good."""
    rows = statistics.rows()
    exact = [work.teacher.get_submodule(linear.inner_name)(rows) for linear in group]
    errors = {}
    for alpha in ALPHAS:
        layers = _students(work, group, statistics, alpha=alpha)
        with memoization():
            outputs = [layer(rows) for layer in layers]
        errors[alpha] = sum(
            float((output - wanted).double().square().sum()) for output, wanted in zip(outputs, exact, strict=True)
        )
    return min(errors, key=errors.__getitem__)


def _students(
    work: BlockWork, group: Group, statistics: InputStatistics | None, *, alpha: float
) -> list[StudentLinear | StudentRows]:
    recipe, seed, first = work.task.recipe, work.task.block_seed, group[0]
    assert all(linear.path == first.path for linear in group), f"{first.name}: linears that share its input differ"
    modules = [work.teacher.get_submodule(linear.inner_name) for linear in group]
    scheme, path, weights = first.scheme, first.path, [module.weight for module in modules]
    shift = basis = amax = None
    if statistics is not None:
        shift = stored_values("input_shift", statistics.mean()) if path.shift else None
        amax = statistics.amax(shift)
    seed_of_rotation = derive_seed(seed, "rotation", first.inner_name)
    transform = _transform(weights, recipe, amax=amax, alpha=alpha, seed=seed_of_rotation)
    if transform is not None and not learns_transforms(recipe):
        transform = transform.rounded()
    if statistics is not None and path.low_rank is not None:
        moment = statistics.second_moment(shift) if path.deflates else None
        basis = _basis(weights, transform, rank=path.low_rank, moment=moment)
    source = StudentInput(
        scheme.activation,
        shift=shift,
        transform=transform,
        low_rank_basis=basis,
        low_rank_from=recipe.transforms.low_rank_from,
        clip=_clip(scheme, recipe),
        steps=path.steps,
        weight=weights[0],
    ).to(weights[0].device)
    learns_clip = recipe.clip.weights
    if recipe.distillation is not None and _is_joint(group, recipe):
        return [*StudentRows.of(modules, scheme=scheme, source=source, learns_clip=learns_clip)]
    layers: list[StudentLinear | StudentRows] = []
    for linear, module in zip(group, modules, strict=True):
        estimator = None
        if path.estimator:
            own_seed, frames = derive_seed(seed, "estimator", linear.inner_name), path.estimator_frames
            estimator = Estimator(linear.in_features, linear.out_features, frames=frames, seed=own_seed)
            estimator = estimator.to(weights[0].device)
        layer = StudentLinear(module, scheme=linear.scheme, source=source, learns_clip=learns_clip, estimator=estimator)
        if recipe.rounding.learned:
            layer.rounding = LearnedRounding(layer.folded_weight(), linear.scheme.weight)
        layers.append(layer)
    return layers


def _is_joint(group: Group, recipe: Recipe) -> bool:
    """Whether nothing of linears that share an input is of one of them alone, except rows of weight, bias and clip."""
    first = group[0]
    alike = all((linear.scheme, linear.has_bias) == (first.scheme, first.has_bias) for linear in group)
    return len(group) > 1 and alike and not (first.path.estimator or first.path.steps or recipe.rounding.learned)


def _transform(
    weights: Sequence[Tensor], recipe: Recipe, *, amax: Tensor | None, alpha: float, seed: int
) -> Transform | None:
    """The recipe's scale and rotation, on the device of the weights; `amax` [T, I] is None without samples."""
    settings, (out_features, in_features) = recipe.transforms, weights[0].shape
    block_size = settings.rotation_block(in_features, out_features)
    transform: Transform | None = None
    if settings.rotation == "kronecker":
        transform = KroneckerTransform.build(in_features, seed=seed, start=settings.start, block_size=block_size)
    elif settings.rotation != "identity":
        transform = ROTATIONS[settings.rotation](in_features, seed=seed, block_size=block_size)
    s = _channel_scale(weights, settings, amax=amax, alpha=alpha)
    if s is not None:
        scale = SmoothScale(s, learnable=settings.learn_scale)
        transform = scale if transform is None else Compose(scale, transform)
    return None if transform is None else transform.to(weights[0].device)


def _channel_scale(
    weights: Sequence[Tensor], settings: Transforms, *, amax: Tensor | None, alpha: float
) -> Tensor | None:
    """The s of the recipe's channel scale, fp64 [I], on the CPU; None without one."""
    if settings.scale == "columns":
        return column_scale([weight.detach() for weight in weights]).cpu()
    if amax is None or settings.scale == "none":
        return None
    largest = torch.stack([weight.abs().amax(dim=0).float() for weight in weights]).amax(dim=0).cpu()
    return smooth_scale(SALIENCES[settings.salience](amax.cpu(), largest), largest, alpha=alpha)


def _basis(weights: Sequence[Tensor], transform: Transform | None, *, rank: int, moment: Tensor | None) -> Tensor:
    """The directions that go through the low-rank branch, [I, r]: of the input with this second moment, or of weights.

    Both are scaled. Their precision is that of a checkpoint.
    """
    if moment is not None:
        scaled = moment if transform is None else transform.scaled(transform.scaled(moment).t())
        directions = principal_directions(scaled.detach(), rank)
    else:
        unscaled = weights if transform is None else [transform.unscaled(weight) for weight in weights]
        directions = weight_directions([weight.detach() for weight in unscaled], rank)
    return stored_values("low_rank_basis", directions).float()


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
