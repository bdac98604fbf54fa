"""From the students of a block to packed linears: Hessians, rounding, and what a packed linear stores of its input.

Modulation linears see one row a call, which depends on its timestep alone or nearly so: GPTQ rounds them with the rows
of every timestep of the generation, not with those of the samples alone.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from s2q.blocks.task import BlockWork, Group
from s2q.calibration.samples import BlockSamples
from s2q.common.errors import located
from s2q.common.hooks import capture_inputs
from s2q.common.torch_state import tf32_products
from s2q.core.memo import in_pieces, memoization
from s2q.core.qparams import RoundedWeight
from s2q.core.tokens import token_grid
from s2q.nn import PackedLinear, StudentInput, StudentLinear, StudentRows
from s2q.planning.resolve import LinearPlan
from s2q.rounding import HessianAccumulator, Rounding, round_rtn

logger = logging.getLogger(__name__)

_Source = Callable[[Tensor], Iterable[Tensor]]

Packed = tuple[dict[str, PackedLinear], dict[str, dict[str, Any]]]
"""Packed linears and the reports of their rounding, both by name inside the block."""


@torch.no_grad()
def pack_nearest(
    module: nn.Module, linears: Iterable[LinearPlan], *, device: str, mean_input: Tensor | None = None
) -> dict[str, PackedLinear]:
    """Round linears of a module to nearest, without an input path; return them, packed, by name inside the module.

    A mean input, [in_features], corrects their biases: at it, outputs are those of full precision (Nagel et al. 2019).
    """
    layers: dict[str, PackedLinear] = {}
    for linear in linears:
        dense = module.get_submodule(linear.inner_name)
        rounded = round_rtn(dense.weight.to(device), linear.scheme.weight)
        packed = PackedLinear.from_rounded(rounded, bias=dense.bias, scheme=linear.scheme)
        if mean_input is not None and packed.bias is not None:
            error = dense.weight.to(device, torch.float32) - packed.dequantized_weight(torch.float32)
            packed.bias.copy_(packed.bias.float() + error @ mean_input.to(device))
        layers[linear.inner_name] = packed
    return layers


@torch.no_grad()
def pack_students(student: nn.Module, work: BlockWork, samples: BlockSamples, groups: Sequence[Group]) -> Packed:
    """Round and pack the students of a block as its recipe says; their transforms are in the form that is stored."""
    hessians: dict[str, HessianAccumulator] = {}
    if work.task.recipe.rounding.needs_hessian:
        firsts = [group[0].inner_name for group in groups]
        sources = {name: _quantized_by(student.get_submodule(name).source, work.task.piece) for name in firsts}
        hessians = _hessians(work, _calls(samples), sources)
    packed: dict[str, PackedLinear] = {}
    reports: dict[str, dict[str, Any]] = {}
    for group in groups:
        layers = [student.get_submodule(linear.inner_name) for linear in group]
        for linears in _by_scheme(group):
            inside = [layers[group.index(linear)] for linear in linears]
            with memoization():
                added, more = pack_group(inside, work, linears, hessian=hessians.get(group[0].inner_name))
            packed, reports = packed | added, reports | more
    return packed, reports


@torch.no_grad()
def pack_group(
    layers: Sequence[StudentLinear | StudentRows],
    work: BlockWork,
    linears: Group,
    *,
    hessian: HessianAccumulator | None = None,
) -> Packed:
    """Round and pack students of one input and scheme: as was learned, or by the recipe's method, with its reports."""
    scheme, weights = linears[0].scheme.weight, [layer.folded_weight() for layer in layers]
    learned = [layer.rounding for layer in layers if isinstance(layer, StudentLinear) and layer.rounding is not None]
    if not learned:
        rounding, ratios = work.task.recipe.rounding, [layer.clip_ratio() for layer in layers]
        results = _round(rounding, linears, weights, clip_ratios=ratios, hessian=hessian)
    else:
        results = []
        for weight, layer in zip(weights, learned, strict=True):
            rounded = layer.rounded()
            changed = float((rounded.codes != round_rtn(weight, scheme).codes).double().mean())
            results.append((rounded, {"changed": changed, "undecided": layer.undecided()}))  # shares of all codes
    packed = {}
    for linear, layer, (rounded, _) in zip(linears, layers, results, strict=True):
        bias = layer.bias
        if bias is not None:
            bias = bias.to(work.task.block.get_submodule(linear.inner_name).bias.dtype)
        packed[linear.inner_name] = PackedLinear.from_rounded(
            rounded, bias=bias, scheme=linear.scheme, inputs=layer.stored(), path=linear.path
        )
    reports = zip(linears, (report for _, report in results), strict=True)
    return packed, {linear.inner_name: report for linear, report in reports if report}


def _by_scheme(group: Group) -> list[Group]:
    """Split linears that share an input by their schemes, which allocation may have changed."""
    return [
        tuple(linear for linear in group if linear.scheme == scheme)
        for scheme in dict.fromkeys(linear.scheme for linear in group)
    ]


@torch.no_grad()
def pack_modulation(work: BlockWork, linears: Sequence[LinearPlan], samples: BlockSamples) -> Packed:
    """Round and pack modulation linears by a Hessian, that of their inputs at every timestep."""
    hessians: dict[str, HessianAccumulator] = {}
    if linears:
        calls = (samples.cast(inputs) for inputs in samples.stream.timestep_inputs())
        hessians = _hessians(work, calls, {linear.inner_name: lambda x: [x] for linear in linears})
    packed: dict[str, PackedLinear] = {}
    reports: dict[str, dict[str, Any]] = {}
    for linear in linears:
        name, rounding = linear.inner_name, work.task.recipe.modulation_rounding
        weight = work.teacher.get_submodule(name).weight
        ((rounded, reports[name]),) = _round(rounding, (linear,), [weight], clip_ratios=[None], hessian=hessians[name])
        bias = work.task.block.get_submodule(name).bias
        packed[name] = PackedLinear.from_rounded(rounded, bias=bias, scheme=linear.scheme)
    return packed, reports


def _round(
    rounding: Rounding,
    linears: Group,
    weights: Sequence[Tensor],
    *,
    clip_ratios: Sequence[Tensor | None],
    hessian: HessianAccumulator | None,
) -> list[tuple[RoundedWeight, dict[str, Any]]]:
    with located(", ".join(linear.name for linear in linears)):
        summed = None if hessian is None else hessian.hessian()
        results = rounding.round(weights, linears[0].scheme.weight, clip_ratios=clip_ratios, hessian=summed)
    for linear, (_, report) in zip(linears, results, strict=True):
        if report.get("fallback"):
            logger.warning("%s: rounded to nearest: %s", linear.name, report["fallback"])
    return results


def _hessians(
    work: BlockWork, calls: Iterable[Mapping[str, Any]], sources: Mapping[str, _Source]
) -> dict[str, HessianAccumulator]:
    """Hessians of the inputs of linears, by name, as their sources pass them on, in pieces."""
    hessians: dict[str, HessianAccumulator] = {}

    def listen(name: str, source: _Source) -> Callable[[Tensor], None]:
        layer = work.teacher.get_submodule(name)
        hessian = hessians[name] = HessianAccumulator(layer.in_features, device=layer.weight.device)

        def add(x: Tensor) -> None:
            for piece in source(x):
                hessian.add(piece)

        return add

    captured = capture_inputs(work.teacher, {name: listen(name, source) for name, source in sources.items()})
    with tf32_products(work.task.device), memoization(), captured:
        for inputs in calls:
            work.teacher(**inputs)
    return hessians


def _calls(samples: BlockSamples) -> Iterator[dict[str, Any]]:
    """The inputs of every sample, each within its token grid."""
    for index in range(len(samples)):
        with token_grid(samples.stream.grid(index)):
            yield samples.inputs(index)


def _quantized_by(source: StudentInput, piece: int) -> _Source:
    """The inputs that a student quantizes, `piece` tokens at a time; nothing is kept of the pieces before."""

    def pieces(x: Tensor) -> Iterator[Tensor]:
        return (split.quantized for split in in_pieces(source, x, piece=piece, cube_frames=source.cube_frames))

    return pieces
