"""Peak memory of a run, from dimensions alone.

What a step of distillation holds is linear in the weights and in the values that go in and out of linears:

    plain           weight · Σ O·I + 10 max O·I + value · Σ rows · (I + O)    an input that linears share counts once
    checkpointed    4 Σ O·I + 20 rows · d + the largest of
                    (weight + 22) max Σ O·I    of linears that share an input
                    piece · max O · rows of a piece
                    whole · max O · rows       where all frames are needed at once
                    channel · rows · d of an attention, and what joins it with a feed-forward

To both come convolutions. The five factors are sums over the parts of a recipe (`_STEP_BYTES`), fitted to the memory of
steps that was traced without storage on blocks of ten published models, up to 131,072 tokens (docs/decisions.md).

Legend: `I/O` in/out features, `N` video tokens, `T` text tokens, `d` channels; `itemsize` bytes of a value in the dtype
of calibration, in functions below `BlockShape` in the model's dtype.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import torch
from torch import nn

from s2q.common.arguments import dtype_name
from s2q.common.components import split_name
from s2q.common.devices import device_memory_bytes, has_bf16_products, host_memory_bytes, lifetime_peak_bytes
from s2q.common.memory import Offload, page_locked_bytes
from s2q.core.input_path import InputPath
from s2q.core.memo import PIECE
from s2q.core.tokens import frames_of_piece
from s2q.models import BlockLinear, Family, block_names, family_of
from s2q.recipes.schema import Recipe

DEFAULT_MEMORY_BUDGET = 16 * 10**9
"""Most that activations of calibration take of the host's memory unless told otherwise."""

_FP32 = torch.float32.itemsize
_WEIGHT, _AT_HAND, _MORE_AT_HAND = 4, 10, 22


class Figures:
    """A dataclass of numbers that are added field by field."""

    def __add__(self, other: Self) -> Self:
        return replace(self, **{name: value + getattr(other, name) for name, value in vars(self).items()})  # type: ignore[type-var]


_KEYS = {"to_q": "to_k", "to_query": "to_key"}
"""The names of an attention's linears for queries and keys."""


@dataclass(frozen=True)
class _StepBytes(Figures):
    """Bytes that a step of distillation holds of a weight and of a value.

    A checkpointed one holds those of a value of a piece, of what is not cut since it needs all frames at once (whole),
    or of a value of a stream in attention.
    """

    weight: float = 0.0
    value: float = 0.0
    piece: float = 0.0
    whole: float = 0.0
    channel: float = 0.0


_STEP_BYTES = {  # by the bytes of a value in the dtype of calibration
    "quantization": {4: _StepBytes(4.8, 11.8, 38, 22.5, 34), 2: _StepBytes(8.3, 12.9, 28, 15.5, 14)},
    "transform": {4: _StepBytes(7.7, 4.8, 6), 2: _StepBytes(9, 3.1, 9)},
    "low rank": {4: _StepBytes(4, 3.9, 4, 0, 2), 2: _StepBytes(5.2, 2.5, 10, 0, 3)},
    "differences": {4: _StepBytes(0, 0, 6), 2: _StepBytes(0, 0, 2)},
}
_KEPT = 20
"""Of a checkpointed step, for each value of a stream: what lies between its parts."""
_CONVOLVED = 1.5
"""Copies of what convolutions return, which are not computed again."""
_LEARNED_WEIGHT = 18
"""In place of the factor of a weight where its rounding is learned, which fixes the transform."""
_LEARNED_STATE = 17
"""Of learned rounding, for each weight: V, its best state and two moments of it in fp32, and a code."""
_ROUNDING_BYTES = 14
"""Bytes that rounding to nearest holds for each weight of the linear at hand, at most: fp32 temporaries and codes."""
_FOLDING_BYTES = 33
"""The same where a rotation is folded into it first: four copies in fp64."""
_GPTQ_BYTES = 30
"""The same of GPTQ: the weight in fp64 and fp32, errors, codes."""
_FACTORIZATION_BYTES = 40
"""Bytes for each entry of the Hessian at hand: four fp64 matrices while it is factorized, and its copy in order."""
_BASIS_BYTES = 52
"""The same of the second moments whose principal directions are computed, in fp64; measured."""
_PACKED_COPIES = 0.6
"""Packed copies of a block in addition to it, in bytes per weight."""
_FORWARD_VALUES = 3
"""Values that live at a time for each one of the widest layer while a block runs without gradients."""
_RUNTIME_BYTES = 100 * 10**6
"""Buffers of libraries, and code that is paged in, once a process computes gradients and factorizations."""
_USABLE = 0.92
"""Share of a GPU's memory that a process can count on."""


@dataclass(frozen=True, kw_only=True)
class PartBytes:
    """Weights of a component of a pipeline: all, and most that group offload has on a device at a time."""

    whole: int
    paged: int

    @classmethod
    def of(cls, whole: int, blocks: Sequence[int] = ()) -> Self:
        """Return those of a component with blocks of so many bytes: two are there, and what is outside of blocks."""
        largest = sorted(blocks)[-2:]
        return cls(whole=whole, paged=whole - sum(blocks) + sum(largest))


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Size of the calibration data.

    Attributes:
        tokens: N of a video.
        frames: Tokens of it along time.
        audio_tokens: Tokens of its sound; 0 without.
        image_tokens: Tokens of an image beside those of the text; 0 without.
        rows: Samples in one call of the transformer: all branches, or one.
        steps: Denoising steps of a video.
        components: The pipeline's components besides transformers, which generate the samples too; None if unknown.
        called: The part of them that each transformer takes, by component; empty where that is unknown.
        generation: How the videos are generated, for people: `GenerationSettings` by name, scheduler and shift.
    """

    tokens: int
    frames: int
    text_tokens: int
    branches: int
    rows: int
    components: Mapping[str, PartBytes] | None
    steps: int = 50
    audio_tokens: int = 0
    image_tokens: int = 0
    called: Mapping[str, int] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def conditioning_tokens(self) -> int:
        """Tokens of text and image."""
        return self.text_tokens + self.image_tokens

    def calls_of(self, components: Sequence[str]) -> Mapping[str, int]:
        """Return the denoising steps of each transformer, in the order of their calls; equal parts if unknown."""
        if self.called:
            return self.called
        ends = [self.steps * index // len(components) for index in range(len(components) + 1)]
        return {name: end - start for name, start, end in zip(components, ends, ends[1:], strict=False)}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine that a run is planned for.

    Attributes:
        memory_bytes: Memory of the device; None does not limit it.
        memory_budget: Host memory for activations of calibration.
        holds_weights: Whether this process has read the model's weights into memory of its own, where they stay.
        offload: How samples are generated there; "auto" takes the first way that fits, see `peaks.chosen_offload`.
        sharing: Workers that generate samples on the device side by side, each with the pipeline.
        bf16_products: Whether the device is a GPU that multiplies bf16.
    """

    device: str
    memory_bytes: int | None
    memory_budget: int
    holds_weights: bool = False
    offload: Offload | Literal["auto"] = "auto"
    sharing: int = 1
    bf16_products: bool = False

    @property
    def process_bytes(self) -> int:
        """Peak memory of the process so far, if the device computes in host memory; else 0."""
        return lifetime_peak_bytes() if self.is_host else 0

    def added_bytes(self, weights: int) -> int:
        """Return what so many bytes of the model's weights add to `process_bytes`."""
        return 0 if self.is_host and self.holds_weights else weights

    @property
    def runtime_bytes(self) -> int:
        """Memory of block calibration besides tensors."""
        return _RUNTIME_BYTES if self.is_host else 0

    @property
    def is_host(self) -> bool:
        """Whether the device computes in host memory."""
        return torch.device(self.device).type == "cpu"

    @property
    def step_limit(self) -> int | None:
        """Limit of the memory of block calibration, above which its steps are checkpointed."""
        if self.is_host:
            return self.memory_budget
        return None if self.memory_bytes is None else int(_USABLE * self.memory_bytes)


@dataclass(frozen=True, kw_only=True)
class CalibrationCost:
    """Cost of block calibration, and the sizes that it was computed for (`Workload`).

    Attributes:
        samples: Calls of a block that it is calibrated on.
        dtype: The dtype that blocks are calibrated in, "bfloat16" or another.
        step_bytes: What a step of distillation holds beside the block's weights.
        gradient_checkpointing: Whether a step computes parts of the block again to hold less.
        activation_bytes: Inputs and targets of the block at hand, over all samples; host memory or disk.
        disk_bytes: The part of them that is on the disk.
    """

    tokens: int
    frames: int
    text_tokens: int
    samples: int
    dtype: str
    step_bytes: int
    gradient_checkpointing: bool
    activation_bytes: int
    disk_bytes: int
    image_tokens: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as PyTorch has it."""
        named: torch.dtype = getattr(torch, self.dtype)
        return named

    @property
    def host_bytes(self) -> int:
        """Bytes of the activations in host memory."""
        return self.activation_bytes - self.disk_bytes


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """The dimensions of one kind of block that memory depends on.

    Attributes:
        parameters: Values of all its parameters.
        weights: O · I of each of its quantized linears except modulation.
        inputs: I and rows of each group of them that shares an input.
        outputs: O and rows of each of them.
        streams: Channels of the video that it returns, and rows in all streams.
        rotations: n1 + n2 of the rotation of each group's input; 0 without.
        ranks: Rank of the low-rank branch of each group's input; 0 without.
        attention: Rows of queries and of keys, and channels of all heads, of each attention.
        modulated: Whether modulation linears are quantized.
        largest: Values of the largest weight; linears that share an input have one weight.
        joint: Values of the widest input of a linear beside attention and feed-forward, beyond those of the streams.
        convolved: Values that convolutions return.
        frame: Video tokens of a frame, at least 1.
    """

    parameters: int
    weights: tuple[int, ...]
    inputs: tuple[tuple[int, int], ...]
    outputs: tuple[tuple[int, int], ...]
    streams: tuple[int, int]
    rotations: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()
    attention: tuple[tuple[int, int, int], ...] = ()
    modulated: bool = False
    largest: int = 0
    joint: int = 0
    convolved: int = 0
    frame: int = 1

    def step_bytes(self, recipe: Recipe, *, checkpointed: bool, itemsize: int) -> int:
        """Return what a step of distillation, or a pass without one, holds beside the block's weights."""
        widest = max((features * rows for features, rows in self.outputs), default=0)
        if not recipe.learns:
            return _WEIGHT * max(self.weights, default=0) + _FORWARD_VALUES * _FP32 * widest
        factors, all_weights = _step_bytes(recipe, itemsize), sum(self.weights)
        state = _LEARNED_STATE * all_weights if recipe.rounding.learned else 0
        convolved = _CONVOLVED * itemsize * self.convolved
        if checkpointed:
            piece = max((features * self._piece_tokens(recipe, rows) for features, rows in self.outputs), default=0)
            channels, rows = self.streams
            attended = max((queries * width for queries, _, width in self.attention), default=channels * rows)
            at_hand = max(
                (factors.weight + _MORE_AT_HAND) * self.largest,
                factors.piece * piece,
                factors.whole * widest if recipe.compares_frames else 0,
                factors.channel * attended + itemsize * self.joint,
            )
            return int(state + convolved + _WEIGHT * all_weights + _KEPT * channels * rows + at_hand)
        values = sum(features * rows for features, rows in (*self.inputs, *self.outputs))
        weights = factors.weight * all_weights + _AT_HAND * max(self.weights, default=0)
        return int(state + convolved + weights + factors.value * values)

    def _piece_tokens(self, recipe: Recipe, rows: int) -> int:
        """The most tokens of a piece of so many in all; cubes of tokens stay whole."""
        if recipe.cube_frames is None or rows <= PIECE:
            return min(rows, PIECE)
        return min(rows, self.frame * frames_of_piece(self.frame, piece=PIECE, cube_frames=recipe.cube_frames))

    def rounding_bytes(self, recipe: Recipe) -> int:
        """Return what rounding the block's linears holds beside its weights."""
        largest = max(self.weights, default=0)
        if not recipe.rounding.needs_hessian:
            return nearest_bytes(recipe) * largest
        squares = [features**2 for features, _ in self.inputs]
        return _FP32 * sum(squares) + _FACTORIZATION_BYTES * max(squares, default=0) + _GPTQ_BYTES * largest

    def basis_bytes(self, recipe: Recipe) -> int:
        """Return what the directions of the low-rank branches take beside the block's weights."""
        if not recipe.transforms.low_rank:
            return 0
        squares = [features**2 for features, _ in self.inputs]
        summed = 0 if recipe.transforms.low_rank_from == "weight" else _FP32 * sum(squares)
        return summed + _BASIS_BYTES * max(squares, default=0)

    def peak_bytes(self, recipe: Recipe, *, checkpointed: bool, itemsize: int, on_host: bool) -> int:
        """Return what the device holds at most while a block is calibrated; a CPU's samples count as activations."""
        weights = self.parameters * itemsize
        step = self.step_bytes(recipe, checkpointed=checkpointed, itemsize=itemsize)
        if not on_host:
            step += self.sample_bytes(itemsize, target_itemsize=itemsize)
        work = max(step, weights, self.rounding_bytes(recipe), self.basis_bytes(recipe))
        return int(weights + _PACKED_COPIES * self.parameters) + work

    def sample_bytes(self, itemsize: int, *, target_itemsize: int, pinned: bool = False) -> int:
        """Return the bytes of one sample: its inputs in the model's dtype, targets in that of calibration, weights.

        Pinned ones are in page-locked host memory; see `common.memory.page_locked_bytes`.
        """
        features, rows = self.streams
        parts = (rows * features * itemsize, rows * features * target_itemsize, rows * _FP32)
        return sum(map(page_locked_bytes, parts)) if pinned else sum(parts)


def nearest_bytes(recipe: Recipe) -> int:
    """Return what rounding to nearest holds for each weight of the linear at hand."""
    return _ROUNDING_BYTES if recipe.transforms.rotation == "identity" else _FOLDING_BYTES


def _step_bytes(recipe: Recipe, itemsize: int) -> _StepBytes:
    settings = recipe.transforms
    parts = {
        "quantization": True,
        "transform": settings.scale != "none" or settings.rotation != "identity",
        "low rank": bool(settings.low_rank),
        "differences": recipe.cube_frames is not None,
    }
    factors = sum((_STEP_BYTES[part][itemsize] for part, has in parts.items() if has), start=_StepBytes())
    return replace(factors, weight=_LEARNED_WEIGHT) if recipe.rounding.learned else factors


def block_shapes(
    transformers: Mapping[str, nn.Module], linears: Sequence[BlockLinear], workload: Workload
) -> list[BlockShape]:
    """Return the dimensions of every block."""
    shapes = []
    for component, transformer in transformers.items():
        family = family_of(transformer)
        for index, name in enumerate(block_names(transformer, family)):
            inside = [linear for linear in linears if split_name(linear.name)[0] == component and linear.block == index]
            block, streams = transformer.get_submodule(name), family.streams_of(name)
            shapes.append(_block_shape(block, family, streams, inside, workload))
    return shapes


def forward_bytes(shapes: Sequence[BlockShape], rows: int, itemsize: int) -> int:
    """Return what a call of the transformer holds beside its weights."""
    widest = max((features * length for shape in shapes for features, length in shape.outputs), default=0)
    return _FORWARD_VALUES * rows * widest * itemsize


def calibration_cost(
    shapes: Sequence[BlockShape], recipe: Recipe, *, workload: Workload, machine: Machine, dtype: torch.dtype
) -> CalibrationCost:
    """Return what calibrating the blocks of a model in a dtype takes, and how."""
    group = recipe.calibration
    blocks_dtype = recipe.calibration_dtype(dtype, bf16_products=machine.bf16_products)
    computed = blocks_dtype.itemsize
    samples = group.samples * (workload.branches if group.branches == "both" else 1)
    on_host = machine.is_host
    whole = max(shape.peak_bytes(recipe, checkpointed=False, itemsize=computed, on_host=on_host) for shape in shapes)
    limit = machine.step_limit
    checkpointed = recipe.learns and limit is not None and whole > limit
    step = max(shape.step_bytes(recipe, checkpointed=checkpointed, itemsize=computed) for shape in shapes)
    activations = samples * max(
        shape.sample_bytes(dtype.itemsize, target_itemsize=computed, pinned=not on_host) for shape in shapes
    )
    return CalibrationCost(
        tokens=workload.tokens,
        frames=workload.frames,
        text_tokens=workload.text_tokens,
        image_tokens=workload.image_tokens,
        samples=samples,
        dtype=dtype_name(blocks_dtype),
        step_bytes=step,
        gradient_checkpointing=checkpointed,
        activation_bytes=activations,
        disk_bytes=max(0, activations - activation_memory(machine, step)),
    )


def activation_memory(machine: Machine, step_bytes: int) -> int:
    """Return the host memory that is left for inputs and targets: on a CPU, a step takes its part of the budget."""
    return max(0, machine.memory_budget - (step_bytes if machine.is_host else 0))


def this_machine(
    device: str,
    *,
    memory_bytes: int | None = None,
    memory_budget: int | None = None,
    offload: Offload | Literal["auto"] = "auto",
    sharing: int = 1,
) -> Machine:
    """Describe the machine at hand, or one like it.

    The memory to plan for is that of the device if it is here, unless given; the budget is half of the host's memory,
    at most 16 GB. A GPU whose memory is given need not be here, and multiplies bf16.
    """
    elsewhere, half = memory_bytes is not None and torch.device(device).type != "cpu", host_memory_bytes() // 2
    return Machine(
        device=device,
        memory_bytes=device_memory_bytes(device) if memory_bytes is None else memory_bytes,
        memory_budget=min(DEFAULT_MEMORY_BUDGET, half) if memory_budget is None else memory_budget,
        offload=offload,
        sharing=sharing,
        bf16_products=elsewhere or has_bf16_products(device),
    )


def _block_shape(
    block: nn.Module, family: Family, streams: Sequence[str], linears: Sequence[BlockLinear], workload: Workload
) -> BlockShape:
    modulated = any(linear.role == "modulation" for linear in linears)
    linears = [linear for linear in linears if linear.role == "linear"]
    shared = {name: group[0] for group in family.shared_inputs for name in group}
    of_stream, video = _stream_tokens(workload, family), family.block_argument("hidden_states")

    def rows(linear: BlockLinear) -> int:
        if linear.sees_audio:
            return workload.audio_tokens
        text = workload.conditioning_tokens
        return text if linear.sees_text else of_stream[video] + (0 if family.is_packed else text)

    first = {shared.get(linear.inner_name, linear.inner_name): linear for linear in linears}
    paths = [getattr(linear, "path", InputPath()) for linear in first.values()]
    channels = next((linear.in_features for linear in linears if not (linear.sees_text or linear.sees_audio)), 0)
    total = sum(of_stream[name] for name in streams)
    of_input: Counter[str] = Counter()
    for linear in linears:
        of_input[shared.get(linear.inner_name, linear.inner_name)] += linear.in_features * linear.out_features
    beside = [linear for linear in linears if "." not in linear.inner_name]  # of attention and feed-forward
    wide_input = max((linear.in_features * rows(linear) for linear in beside), default=0)
    convolutions = [module for module in block.modules() if isinstance(module, nn.Conv1d | nn.Conv2d)]
    return BlockShape(
        parameters=sum(parameter.numel() for parameter in block.parameters()),
        weights=tuple(linear.in_features * linear.out_features for linear in linears),
        inputs=tuple((linear.in_features, rows(linear)) for linear in first.values()),
        outputs=tuple((linear.out_features, rows(linear)) for linear in linears),
        streams=(channels, total),
        rotations=tuple((path.left or 0) + (path.right or 0) for path in paths),
        ranks=tuple(path.low_rank or 0 for path in paths),
        attention=_attention(block, family, workload),
        modulated=modulated,
        largest=max(of_input.values(), default=0),
        convolved=workload.tokens * sum(conv.out_channels for conv in convolutions),
        joint=max(0, wide_input - channels * total),
        frame=max(workload.tokens // workload.frames, 1),
    )


def _attention(block: nn.Module, family: Family, workload: Workload) -> tuple[tuple[int, int, int], ...]:
    """Queries, keys and channels of each attention of a block: joint with the text, of the video, or cross."""
    own = sum(_stream_tokens(workload, family)[name] for name in family.joint_order)
    known = dict.fromkeys(family.text_linears, workload.conditioning_tokens)
    known |= dict.fromkeys(family.audio_linears, workload.audio_tokens)
    attentions = []
    for name, module in block.named_modules():
        if name.endswith((".to_q", ".to_query")) and isinstance(module, nn.Linear):
            attention, _, query = name.rpartition(".")
            keys = known.get(f"{attention}.{_KEYS[query]}", own)
            attentions.append((known.get(name, own), keys, module.out_features))
    return tuple(attentions)


def _stream_tokens(workload: Workload, family: Family) -> dict[str, int]:
    """Tokens of each stream of a block, by the name of its argument."""
    others = workload.conditioning_tokens + workload.audio_tokens if family.is_packed else 0
    return {
        family.block_argument("hidden_states"): workload.tokens + others,
        "control_hidden_states": workload.tokens,
        family.block_argument("encoder_hidden_states"): workload.conditioning_tokens,
        "audio_hidden_states": workload.audio_tokens,
    }
