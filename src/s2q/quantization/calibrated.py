"""One block with calibration: token importance, initial transforms, distillation, GPTQ, packing.

Everything is computed from the block's weights and the inputs that the teacher's stream gives it, in fp32 unless the
recipe asks for the model's own dtype; the targets are what a copy of the block in that dtype makes of these inputs.
Modulation linears see one row a call, which depends on its timestep alone or nearly so: GPTQ rounds them with the rows
of every timestep of the generation, not with those of the samples alone. They stand in the student as they will be in
the checkpoint.

Legend: `I/O` in/out features, `N_k` tokens of stream k.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2q.core.errors import S2QError
from s2q.core.layout import PREFIX
from s2q.core.placement import moved
from s2q.core.qparams import RoundedWeight
from s2q.core.reuse import parameters_held
from s2q.core.schemes import LinearScheme
from s2q.core.seeds import derive_seed
from s2q.distillation import (
    BlockSample,
    DistillationOptions,
    block_loss,
    capture_column_sums,
    checkpointed,
    distil,
    split_weights,
    token_weights,
)
from s2q.models import Family
from s2q.nn import PACKED_DTYPES, LearnableClip, PackedLinear, StudentInput, StudentLinear, replace_module
from s2q.quantization.statistics import InputStatistics
from s2q.quantization.stream import TeacherStream, TensorStore
from s2q.recipes import Recipe
from s2q.recipes.schema import GPTQ
from s2q.rounding import ROUNDINGS, HessianAccumulator, round_gptq
from s2q.transforms import (
    ROTATIONS,
    Compose,
    KroneckerTransform,
    SmoothScale,
    Transform,
    principal_directions,
    smooth_scale,
)


@dataclass(frozen=True, kw_only=True)
class BlockCalibration:
    """What a block is calibrated with.

    Attributes:
        stream: The teacher's stream; is moved to the block.
        index: Index of the block.
        family: Family of the model.
        seed: Seed of the run; the block's own is derived from it and the index.
        progress: Called after each unit of work: an epoch, or what takes about as long.
        checkpointed: Whether a step of distillation computes parts of the block again to hold less.
    """

    stream: TeacherStream
    index: int
    family: Family
    seed: int
    progress: Callable[[], None] = lambda: None
    checkpointed: bool = False


@dataclass(frozen=True, kw_only=True)
class CalibratedBlock:
    """What came of it.

    Attributes:
        layers: Packed linear by full name.
        loss: Mean weighted loss over the samples: `rtn` (rounded to nearest, nothing before the linears), `initial`
            (transforms as they start), `distilled` (the best state, still rounded to nearest) and `final` (as packed).
        distillation: Its report; None without distillation.
        rounding: GPTQ's report by full name; empty without it.
    """

    layers: Mapping[str, PackedLinear]
    loss: Mapping[str, float]
    distillation: Mapping[str, Any] | None
    rounding: Mapping[str, Mapping[str, Any]]


class _Samples:
    """The samples of a block: inputs from the stream, targets and weights from a store; on the device."""

    def __init__(
        self, stream: TeacherStream, targets: TensorStore, streams: Sequence[str], cast: Callable[[Any], Any]
    ) -> None:
        self.stream, self.targets, self.streams, self.cast = stream, targets, streams, cast
        self.device = stream.device

    def __len__(self) -> int:
        return len(self.stream)

    def inputs(self, index: int) -> dict[str, Any]:
        return {name: self.cast(value) for name, value in self.stream.inputs(index).items()}

    def __getitem__(self, index: int) -> BlockSample:
        stored = moved(self.targets.get(index), self.stream.device)
        weights = tuple(stored[f"weights.{name}"] for name in self.streams) if len(stored) > len(self.streams) else None
        return BlockSample(
            inputs=self.inputs(index), outputs=tuple(stored[name] for name in self.streams), weights=weights
        )


def calibrate_block(
    block: nn.Module,
    linears: Mapping[str, str],
    *,
    schemes: Mapping[str, LinearScheme],
    recipe: Recipe,
    calibration: BlockCalibration,
    device: str = "cpu",
) -> CalibratedBlock:
    """Carry out the recipe on one block.

    Args:
        block: The full-precision block; not changed.
        linears: Full name by name inside the block, of the linears to quantize.
        schemes: Scheme by full name.
        recipe: A recipe that calibrates.
        calibration: What to calibrate with.
        device: Where to compute.

    Returns:
        The packed linears and what was measured.

    Raises:
        InvalidInputError: If the activations hold NaN or infinite values.
        S2QError: If GPTQ fails and the recipe does not allow the fallback.
    """
    teacher = copy.deepcopy(block).to(device).requires_grad_(False).eval()
    wide = recipe.calibration.precision == "float32"
    cast = functools.partial(moved, device=device, dtype=torch.float32 if wide else None)
    if wide:
        teacher = teacher.float()
    calibration.stream.advance(calibration.index)
    groups = _groups(linears, calibration.family)
    targets = calibration.stream.store("targets")
    samples = _Samples(calibration.stream, targets, calibration.family.streams, cast)
    try:
        statistics = _run_teacher(teacher, samples, groups, recipe=recipe, calibration=calibration)
        calibration.progress()
        return _Stage(block, teacher, linears, schemes=schemes, recipe=recipe).carry_out(
            samples, groups, statistics, calibration
        )
    finally:
        targets.clear()


class _Stage:
    """The steps of a block, after its targets are known."""

    def __init__(
        self,
        block: nn.Module,
        teacher: nn.Module,
        linears: Mapping[str, str],
        *,
        schemes: Mapping[str, LinearScheme],
        recipe: Recipe,
    ) -> None:
        self.block, self.teacher, self.linears = block, teacher, linears
        self.schemes, self.recipe = schemes, recipe

    def carry_out(
        self,
        samples: _Samples,
        groups: Sequence[tuple[str, ...]],
        statistics: Mapping[str, InputStatistics],
        calibration: BlockCalibration,
    ) -> CalibratedBlock:
        grouped = {name for group in groups for name in group}
        nearest = {name: self._nearest(name) for name in self.linears}
        loss = {"rtn": block_loss(self._copy(nearest), samples)}
        modulation = {name: layer for name, layer in nearest.items() if name not in grouped}
        reports: dict[str, dict[str, Any]] = {}
        if self.recipe.modulation is not None and self.recipe.modulation.rounding == GPTQ:
            modulation, reports = self._round_modulation(list(modulation), samples)
        student = self._copy(modulation)
        seed = derive_seed(calibration.seed, "block", calibration.index)
        for group in groups:
            self._put_students(student, group, statistics[group[0]], seed=derive_seed(seed, "rotation", group[0]))
        loss["initial"] = block_loss(student, samples)
        report = None
        if self.recipe.distillation is not None:
            options = DistillationOptions(**self.recipe.distillation.model_dump())
            with checkpointed(student) if calibration.checkpointed else nullcontext():
                report = distil(
                    student, samples, options=options, seed=derive_seed(seed, "order"), epoch_done=calibration.progress
                )
            loss["distilled"] = report.loss
        student.requires_grad_(False)
        packed, rounding = self._round(student, samples, groups)
        packed |= modulation
        reports |= rounding
        loss["final"] = block_loss(self._copy(packed), samples)
        calibration.progress()
        return CalibratedBlock(
            layers={self.linears[name]: packed[name].to("cpu") for name in self.linears},
            loss=loss,
            distillation=None if report is None else asdict(report),
            rounding={self.linears[name]: one for name, one in reports.items()},
        )

    def _copy(self, layers: Mapping[str, nn.Module]) -> nn.Module:
        result = copy.deepcopy(self.teacher)
        for name, layer in layers.items():
            replace_module(result, name, layer)
        return result

    def _scheme(self, name: str) -> LinearScheme:
        return self.schemes[self.linears[name]]

    def _nearest(self, name: str) -> PackedLinear:
        """The linear rounded to nearest, nothing before it."""
        weight = self.teacher.get_submodule(name).weight
        rounded = ROUNDINGS["rtn"](weight, self._scheme(name).weight)
        return PackedLinear.from_rounded(rounded, bias=self.block.get_submodule(name).bias, scheme=self._scheme(name))

    def _put_students(
        self, student: nn.Module, group: tuple[str, ...], statistics: InputStatistics, *, seed: int
    ) -> None:
        recipe, first = self.recipe, self._scheme(group[0])
        device = statistics.low.device
        weights = [self.teacher.get_submodule(name).weight for name in group]
        shift = None
        if recipe.transforms.shift == "mean":
            biased = {self.teacher.get_submodule(name).bias is not None for name in group}
            assert len(biased) == 1, f"{group}: some have a bias and some do not"
            shift = statistics.mean() if biased == {True} else None
        amax = statistics.amax(shift)
        transform = self._transform(amax, weights, seed=seed)
        if transform is not None:
            transform.to(device)
        basis = None
        if rank := self._rank(group):
            moment = statistics.second_moment(shift)
            if transform is not None:
                moment = transform.scaled(transform.scaled(moment).t())
            basis = principal_directions(moment.detach(), rank).to(PACKED_DTYPES["low_rank_basis"]).float()
        clip: nn.Module | None = None
        if first.activation is not None and recipe.clip.activations:
            clip = LearnableClip((1,), start=recipe.clip.start, device=device)
        elif first.activation is not None and recipe.clip.constant is not None:
            clip = _ConstantClip(recipe.clip.constant).to(device)
        source = StudentInput(
            first.activation,
            shift=shift,
            transform=transform,
            low_rank_basis=basis,
            clip=clip,
        )
        for name in group:
            linear, scheme = self.teacher.get_submodule(name), self._scheme(name)
            if recipe.clip.weights:
                layer = StudentLinear.with_clip(linear, scheme=scheme, source=source, start=recipe.clip.start)
            else:
                layer = StudentLinear(linear, scheme=scheme, source=source)
            replace_module(student, name, layer)

    def _rank(self, group: tuple[str, ...]) -> int | None:
        """Rank of the low-rank branch before linears that share an input."""
        weights = [self.teacher.get_submodule(name).weight for name in group]
        ranks = {self.recipe.transforms.rank(*reversed(weight.shape)) for weight in weights}
        assert len(ranks) == 1, f"{group}: their sizes ask for low-rank branches of ranks {sorted(map(str, ranks))}"
        return ranks.pop()

    def _transform(self, amax: Tensor, weights: Sequence[Tensor], *, seed: int) -> Transform | None:
        settings = self.recipe.transforms
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

    @torch.no_grad()
    def _round(
        self, student: nn.Module, samples: _Samples, groups: Sequence[tuple[str, ...]]
    ) -> tuple[dict[str, PackedLinear], dict[str, dict[str, Any]]]:
        use_gptq = self.recipe.rounding.method == GPTQ
        hessians: dict[str, HessianAccumulator] = {}
        if use_gptq:
            sources = {group[0]: _quantized_by(student.get_submodule(group[0]).source) for group in groups}
            hessians = self._hessians((samples.inputs(index) for index in range(len(samples))), sources)
        packed: dict[str, PackedLinear] = {}
        reports: dict[str, dict[str, Any]] = {}
        for group in groups:
            inputs = _stored_inputs(student.get_submodule(group[0]).source)
            for name in group:
                layer, scheme = student.get_submodule(name), self._scheme(name)
                weight, ratio = layer.folded_weight(), layer.clip_ratio()
                if use_gptq:
                    rounded, reports[name] = self._gptq(name, weight, hessians[group[0]], clip_ratio=ratio)
                else:
                    rounded = ROUNDINGS[self.recipe.rounding.method](weight, scheme.weight, clip_ratio=ratio)
                bias = None if layer.bias is None else layer.bias.to(self.block.get_submodule(name).bias.dtype)
                packed[name] = PackedLinear.from_rounded(
                    rounded, bias=bias, scheme=scheme, inputs=inputs | _stored_branch(layer)
                )
        return packed, reports

    @torch.no_grad()
    def _round_modulation(
        self, names: Sequence[str], samples: _Samples
    ) -> tuple[dict[str, PackedLinear], dict[str, dict[str, Any]]]:
        hessians: dict[str, HessianAccumulator] = {}
        if names:
            calls = (samples.cast(inputs) for inputs in samples.stream.timestep_inputs())
            hessians = self._hessians(calls, dict.fromkeys(names, _as_it_is))
        packed: dict[str, PackedLinear] = {}
        reports: dict[str, dict[str, Any]] = {}
        for name in names:
            rounded, reports[name] = self._gptq(name, self.teacher.get_submodule(name).weight, hessians[name])
            bias = self.block.get_submodule(name).bias
            packed[name] = PackedLinear.from_rounded(rounded, bias=bias, scheme=self._scheme(name))
        return packed, reports

    def _gptq(
        self, name: str, weight: Tensor, hessian: HessianAccumulator, *, clip_ratio: Tensor | None = None
    ) -> tuple[RoundedWeight, dict[str, Any]]:
        try:
            rounded, report = round_gptq(
                weight,
                self._scheme(name).weight,
                hessian=hessian.hessian(),
                clip_ratio=clip_ratio,
                options=self.recipe.rounding.options(),
            )
        except S2QError as error:
            raise type(error)(f"{self.linears[name]}: {error}") from error
        return rounded, asdict(report)

    def _hessians(
        self, calls: Iterable[Mapping[str, Any]], sources: Mapping[str, Callable[[Tensor], Tensor]]
    ) -> dict[str, HessianAccumulator]:
        """Hessians of the inputs of linears, by name, as their sources pass them on."""
        found: dict[str, HessianAccumulator] = {}

        def listen(name: str, source: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
            layer = self.teacher.get_submodule(name)
            found[name] = HessianAccumulator(layer.in_features, device=layer.weight.device)
            return lambda x: found[name].add(source(x))

        with parameters_held(), _heard(self.teacher, {name: listen(name, one) for name, one in sources.items()}):
            for inputs in calls:
                self.teacher(**inputs)
        return found


class _ConstantClip(nn.Module):
    """A ratio that is not learned; stands in for `LearnableClip`."""

    ratio: Tensor

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.register_buffer("ratio", torch.tensor([ratio], dtype=torch.float32))

    def forward(self) -> Tensor:
        return self.ratio


def _quantized_by(source: StudentInput) -> Callable[[Tensor], Tensor]:
    return lambda x: source(x).quantized


def _as_it_is(x: Tensor) -> Tensor:
    return x


@torch.no_grad()
def _run_teacher(
    teacher: nn.Module,
    samples: _Samples,
    groups: Sequence[tuple[str, ...]],
    *,
    recipe: Recipe,
    calibration: BlockCalibration,
) -> dict[str, InputStatistics]:
    """Store targets and token weights of every sample; return the statistics of each group's input."""
    family, loss = calibration.family, recipe.loss
    statistics: dict[str, InputStatistics] = {}
    for first, *_ in groups:
        linear = teacher.get_submodule(first)
        statistics[first] = InputStatistics(
            linear.in_features, linear.weight.device, moments=recipe.transforms.low_rank > 0
        )
    with _heard(teacher, {name: one.add for name, one in statistics.items()}):
        for index in range(len(samples)):
            weighted = loss.weighting == "attention"
            attention = teacher.get_submodule(family.attention)
            with capture_column_sums(attention) if weighted else nullcontext() as captured:
                outputs = teacher(**samples.inputs(index))
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            calibration.stream.check(outputs, block=calibration.index, sample=index)
            stored = dict(zip(family.streams, outputs, strict=True))
            if captured is not None:
                lengths = [stored[name].shape[1] for name in family.joint_order]
                sums = captured.joined()
                left_out = sum(lengths) - sums.shape[1]  # text at the end that a prompt does not fill gets no attention
                assert left_out == 0 or (left_out > 0 and family.joint_order[-1] == "encoder_hidden_states"), left_out
                weights = token_weights(
                    F.pad(sums, (0, left_out)), lambda_min=loss.lambda_min, lambda_max=loss.lambda_max
                )
                own = dict(zip(family.joint_order, split_weights(weights, lengths), strict=True))
                for name, output in zip(family.streams, outputs, strict=True):
                    stored[f"weights.{name}"] = own.get(name, torch.ones_like(output[..., 0]))
            samples.targets.put(index, stored)
    return statistics


@contextmanager
def _heard(block: nn.Module, listeners: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Tell listeners the inputs of modules, by name."""
    with ExitStack() as stack:
        for name, listener in listeners.items():
            handle = block.get_submodule(name).register_forward_pre_hook(
                lambda _module, args, listener=listener: listener(args[0])
            )
            stack.callback(handle.remove)
        yield


def _groups(linears: Mapping[str, str], family: Family) -> list[tuple[str, ...]]:
    """The linears to quantize but for modulation, by shared input; one that shares nothing is alone."""
    groups = [tuple(name for name in group if name in linears) for group in family.shared_inputs]
    shared = {name for group in groups for name in group}
    groups += [(name,) for name in linears if name not in shared and name not in family.modulation]
    return [group for group in groups if group]


@torch.no_grad()
def _stored_inputs(source: StudentInput) -> dict[str, Tensor]:
    """What the packed linears store of their input: the tensors of shift, transform, basis and clip."""
    tensors: dict[str, Tensor] = {}
    if source.shift is not None:
        tensors["input_shift"] = source.shift
    if source.transform is not None:
        tensors |= {PREFIX + name: value for name, value in source.transform.state_tensors().items()}
    if source.low_rank_basis is not None:
        tensors["low_rank_basis"] = source.low_rank_basis.to(PACKED_DTYPES["low_rank_basis"])
    if source.clip is not None:
        tensors["activation_clip"] = source.clip().detach().reshape(1).clone()
    return tensors


def _stored_branch(layer: StudentLinear) -> dict[str, Tensor]:
    """What a packed linear stores of its own part of a low-rank branch, if there is one."""
    if layer.source.low_rank_basis is None:
        return {}
    return {"low_rank_weight": layer.low_rank_weight().to(PACKED_DTYPES["low_rank_weight"])}
