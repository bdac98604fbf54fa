"""The groups of keys of a recipe, one for each part of a method; unknown keys are refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from s2q.common.errors import nearest_names, short_repr
from s2q.core.schemes import (
    LEVELS,
    MAX_BITS,
    MIN_BITS,
    UNIFORM,
    Delta,
    PerChannel,
    PerGroup,
    PerToken,
    QuantScheme,
)
from s2q.rounding import ROUNDINGS, AdaRoundOptions, GPTQOptions
from s2q.selection.selection import SELECTIONS
from s2q.transforms import ROTATIONS, SALIENCES, STARTS

GPTQ = "gptq"
ADAROUND = "adaround"
SEARCH = "search"

_WIDTH_PER_RANK = 12  # in a small linear the branch stays below two thirds of the bytes of 4-bit codes


Side = Annotated[int, Field(ge=1)]
Number = Annotated[float, Field(allow_inf_nan=False)]


def _alpha(value: Any) -> Any:
    """Read a share of 0 to 1 or the word for a search."""
    if value == SEARCH or (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1):
        return value
    raise ValueError(f"got {short_repr(value)}; expected 0 to 1, or {SEARCH}")


Alpha = Annotated[float | Literal["search"], BeforeValidator(_alpha)]


def _one_of(kind: str, options: Iterable[str]) -> AfterValidator:
    """Refuse a name that is not among the options, with the nearest ones."""
    known = sorted(options)

    def check(name: str) -> str:
        if name not in known:
            near = nearest_names(name, known)
            hint = f"nearest names are {', '.join(near)}; " if near else ""
            raise ValueError(f"unknown {kind} {short_repr(name)}: {hint}all: {', '.join(known)}")
        return name

    return AfterValidator(check)


def to_tuple(value: Any) -> Any:
    """Read a list of YAML as a tuple."""
    return tuple(value) if isinstance(value, list) else value


Rounding = Annotated[str, _one_of("rounding", (*ROUNDINGS, GPTQ))]
Levels = Annotated[str, _one_of("levels", LEVELS)]


class Group(BaseModel):
    """Keys that belong together: unknown ones are refused, values are not converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Grouped(Group):
    num_bits: int = Field(ge=MIN_BITS, le=MAX_BITS)
    granularity: str
    group_size: int | None = Field(default=None, ge=1)
    levels: Levels = UNIFORM

    @model_validator(mode="after")
    def _group_size_fits_granularity(self) -> Self:
        if self.granularity == "per_group" and self.group_size is None:
            raise ValueError("granularity=per_group needs a group_size; use 64, 128 or 256")
        if self.granularity != "per_group" and self.group_size is not None:
            raise ValueError(f"group_size={self.group_size} needs granularity=per_group; got {self.granularity}")
        return self


class WeightsGroup(_Grouped):
    """How weights are quantized: symmetric, static.

    Attributes:
        levels: "uniform", or "lloyd_max", a codebook for values of a normal distribution, as a rotation makes them (see
            `s2q.core.codebook`); no kernel takes that, it is simulated in floating point.
    """

    granularity: Literal["per_channel", "per_group"] = "per_channel"

    def scheme(self) -> QuantScheme:
        """Return the scheme of a weight."""
        granularity = PerChannel() if self.group_size is None else PerGroup(group_size=self.group_size)
        return QuantScheme(num_bits=self.num_bits, granularity=granularity, levels=self.levels)


class ModulationGroup(WeightsGroup):
    """How the weights of the adaLN linears are quantized; their inputs are not.

    Attributes:
        rounding: "rtn", or "gptq" with the Hessian of their inputs at every timestep; its settings are those of
            `RoundingGroup`.
    """

    rounding: Rounding = "rtn"


class DeltaGroup(Group):
    """How video tokens are quantized as differences from the mean token of their cube.

    Attributes:
        cube: Tokens of a cube along frames, rows and columns.
        mean_bits: Bits of the mean tokens.
    """

    cube: Annotated[tuple[Side, Side, Side], BeforeValidator(to_tuple)] = (2, 2, 2)
    mean_bits: int = Field(default=MAX_BITS, ge=MIN_BITS, le=MAX_BITS)


class ActivationsGroup(_Grouped):
    """How the inputs of linears are quantized: symmetric, dynamic, each token by itself.

    Attributes:
        granularity: "per_token", one scale each, on integer kernels; "per_group", one for each `group_size` channels of
            a token, which no kernel takes: it is simulated in floating point.
        levels: As of weights.
        delta: Whether, and how, a video token is taken apart into the mean of its cube and the difference from it; no
            kernel takes that either. None quantizes tokens whole.
    """

    granularity: Literal["per_token", "per_group"] = "per_token"
    delta: DeltaGroup | None = None

    def scheme(self, *, of_text: bool = False) -> QuantScheme:
        """Return the scheme of an activation.

        Args:
            of_text: Whether it is that of text tokens alone, which lie in no cubes.
        """
        granularity = PerToken() if self.group_size is None else PerGroup(group_size=self.group_size)
        delta = None
        if self.delta is not None and not of_text:
            delta = Delta(cube=self.delta.cube, mean_bits=self.delta.mean_bits)
        return QuantScheme(
            num_bits=self.num_bits, granularity=granularity, dynamic=True, levels=self.levels, delta=delta
        )


class CalibrationGroup(Group):
    """What a recipe calibrates on: denoising steps of a few prompts, of which the salient ones are selected.

    Attributes:
        n_prompts: Prompts to generate; the first ones, where more are given.
        steps: Denoising steps of each; None takes the model's own number.
        num_frames: Frames of each; None takes the model's own number. Fewer, and smaller ones, cost less.
        height: Height of a frame in pixels, likewise.
        width: Width of a frame in pixels, likewise.
        samples: Candidates (a denoising step of a prompt) to take.
        selection: How they are taken; one of `SELECTIONS`.
        branches: Which guidance branch of a candidate is the sample: "alternate" takes the conditional and the
            unconditional one in turn, over the samples; "both" makes two samples of each.
        precision: In which dtype blocks are calibrated: fp32, or that of the model, which takes half of the memory in
            bf16. What is learned, and the sums behind GPTQ, are in fp32 either way.
    """

    n_prompts: int = Field(default=10, ge=1)
    steps: int | None = Field(default=None, ge=1)
    num_frames: int | None = Field(default=None, ge=1)
    height: int | None = Field(default=None, ge=1)
    width: int | None = Field(default=None, ge=1)
    samples: int = Field(default=40, ge=1)
    selection: Annotated[str, _one_of("selection", SELECTIONS)] = "sds"
    branches: Literal["alternate", "conditional", "both"] = "alternate"
    precision: Literal["float32", "model"] = "float32"


class TransformsGroup(Group):
    """What stands before the linears: a shift, a channel scale, then a rotation.

    Attributes:
        shift: "mean" subtracts the mean of each channel over the calibration samples; the linears' biases make up for
            it, so that inputs of linears without a bias are not shifted.
        scale: "smooth" for SmoothQuant's scale.
        alpha: How much of the outliers goes from the input to the weight; "search" takes for each input of linears the
            one of a grid whose quantized outputs are nearest to the exact ones (`s2q.blocks.students`).
        salience: What the scale takes for the size of an input's channels; one of `SALIENCES`: the largest magnitude
            over all timesteps, or PTQ4DiT's weighted mean over timesteps.
        learn_scale: Whether distillation learns the scale.
        rotation: One of `ROTATIONS`; "kronecker" is learned where there is distillation.
        start: Where a Kronecker rotation starts; one of `STARTS`.
        low_rank: How many directions go to the output in floating point; 0 for none. At most a 12th of the smaller side
            of a linear (see `rank`).
        low_rank_from: Which they are, and what is quantized without them: "input" for the largest of the input after
            shift and scale, "weight" for the top singular vectors of the weights that read it, scaled; "both" takes
            those of the input out of the weights too.
        estimator: Whether distillation learns a correction of rank one of the output, with a scale for each frame
            (`s2q.nn.Estimator`).
    """

    shift: Literal["none", "mean"] = "none"
    scale: Literal["none", "smooth"] = "none"
    alpha: Alpha = 0.5
    salience: Annotated[str, _one_of("salience", SALIENCES)] = "max"
    learn_scale: bool = True
    rotation: Annotated[str, _one_of("rotation", ROTATIONS)] = "identity"
    start: Annotated[str, _one_of("start", STARTS)] = "hadamard"
    low_rank: int = Field(default=0, ge=0)
    low_rank_from: Literal["input", "weight", "both"] = "input"
    estimator: bool = False

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.alpha == SEARCH and self.scale == "none":
            raise ValueError("alpha=search needs a scale; set transforms.scale=smooth")
        if self.low_rank_from != "input" and self.low_rank == 0:
            raise ValueError(f"low_rank_from={self.low_rank_from} needs a branch; set transforms.low_rank=32")
        return self

    @property
    def deflates(self) -> bool:
        """Whether the low-rank branch is taken out of the input; if not, it is out of the weight."""
        return self.low_rank_from != "weight"

    def rank(self, in_features: int, out_features: int) -> int | None:
        """Return the rank of a linear's low-rank branch, or None if it has none.

        Args:
            in_features: I.
            out_features: O.
        """
        return min(self.low_rank, min(in_features, out_features) // _WIDTH_PER_RANK) or None


class ClipGroup(Group):
    """Clipping ratios.

    Attributes:
        weights: Whether a ratio for each output channel is learned.
        activations: Whether a ratio for each input of linears is learned.
        start: Logit of the learned ones at the start: sigmoid(4) = 0.982.
        constant: A ratio of activations that is not learned.
    """

    weights: bool = False
    activations: bool = False
    start: Number = 4.0
    constant: Number | None = Field(default=None, gt=0, le=1)

    @model_validator(mode="after")
    def _one_ratio(self) -> ClipGroup:
        if self.activations and self.constant is not None:
            raise ValueError("clip.activations and clip.constant exclude each other; leave one out")
        return self


class LossGroup(Group):
    """How distillation weights tokens (eq. 10 and 11), and what else it keeps.

    Attributes:
        weighting: "attention" weights a token by how much attention it gets.
        lambda_min: Weight of the token that gets the least.
        lambda_max: Weight of the one that gets the most.
        temporal: Weight of the loss on the similarities of frames (`s2q.distillation.temporal_loss`); 0 for none.
    """

    weighting: Literal["uniform", "attention"] = "uniform"
    lambda_min: Number = Field(default=0.5, ge=0)
    lambda_max: Number = Field(default=1.0, gt=0)
    temporal: Number = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> LossGroup:
        if self.lambda_min > self.lambda_max:
            raise ValueError(f"loss: lambda_min={self.lambda_min} is above lambda_max={self.lambda_max}; lower it")
        return self


class DistillationGroup(Group):
    """How a block is optimised: AdamW, cosine schedule, one sample at a time."""

    epochs: int = Field(default=15, ge=1)
    lr: Number = Field(default=5e-3, gt=0)
    clip_lr: Number = Field(default=5e-2, gt=0)
    rounding_lr: Number = Field(default=3e-2, gt=0)
    weight_decay: Number = Field(default=0.0, ge=0)


class RefinementGroup(Group):
    """How scales, biases, low-rank weights and clips are learned once more, after rounding; codes stand still.

    Attributes:
        epochs: Passes over the samples.
        lr: Learning rate of what is learned, in units of what it changes.
        clip_lr: Learning rate of clips.
    """

    epochs: int = Field(default=5, ge=1)
    lr: Number = Field(default=1e-3, gt=0)
    clip_lr: Number = Field(default=1e-2, gt=0)


class RoundingGroup(Group):
    """How weights are rounded to codes.

    Attributes:
        method: "rtn", "gptq", or "adaround", which distillation learns.
        dampening_frac: Of GPTQ, as the four after it; see `s2q.rounding.GPTQOptions`.
        block_size: See there.
        act_order: See there.
        max_retries: See there.
        allow_fallback: See there.
        penalty: Of AdaRound, as the three after it; see `s2q.rounding.AdaRoundOptions`.
        warmup: See there.
        beta_start: See there.
        beta_end: See there.
    """

    method: Annotated[str, _one_of("rounding", (*ROUNDINGS, GPTQ, ADAROUND))] = "rtn"
    dampening_frac: Number = Field(default=0.01, ge=0)
    block_size: int = Field(default=128, ge=1)
    act_order: bool = True
    max_retries: int = Field(default=4, ge=0)
    allow_fallback: bool = False
    penalty: Number = Field(default=1000.0, ge=0)
    warmup: Number = Field(default=0.2, ge=0, lt=1)
    beta_start: Number = Field(default=20.0, gt=1)
    beta_end: Number = Field(default=2.0, gt=1)

    @model_validator(mode="after")
    def _beta_falls(self) -> Self:
        if self.beta_end > self.beta_start:
            raise ValueError(f"rounding: beta_end={self.beta_end} is above beta_start={self.beta_start}; lower it")
        return self

    def gptq(self) -> GPTQOptions:
        """Return the settings of GPTQ."""
        return GPTQOptions(**self.model_dump(include={one.name for one in fields(GPTQOptions)}))

    def adaround(self) -> AdaRoundOptions:
        """Return the settings of AdaRound."""
        return AdaRoundOptions(**self.model_dump(include={one.name for one in fields(AdaRoundOptions)}))


class AllocationGroup(Group):
    """What block linears are given one by one, by how much each of them needs it, in place of one value for all.

    Attributes:
        what: "group_size" of weights, and of activations where those are grouped; or "weight_bits".
        candidates: The values; of group sizes, those that divide its in features are candidates of a linear.
        budget: Bits that a weight of these linears takes at most, on the average, as stored: scales count, and codes of
            5 to 8 bits take a byte.
        samples: Calibration samples on which it is measured what a candidate does to a block.
    """

    what: Literal["group_size", "weight_bits"]
    candidates: Annotated[tuple[int, ...], BeforeValidator(to_tuple)]
    budget: Number = Field(gt=0)
    samples: int = Field(default=8, ge=1)

    @field_validator("candidates")
    @classmethod
    def _different_and_in_range(cls, candidates: tuple[int, ...]) -> tuple[int, ...]:
        if len(candidates) < 2 or len(set(candidates)) < len(candidates) or min(candidates) < 1:
            raise ValueError(f"got {list(candidates)}; expected at least two different whole numbers above 0")
        return candidates

    @model_validator(mode="after")
    def _bits_in_range(self) -> AllocationGroup:
        if self.what == "weight_bits" and not all(MIN_BITS <= bits <= MAX_BITS for bits in self.candidates):
            raise ValueError(f"candidates={list(self.candidates)}; expected bits, each {MIN_BITS} to {MAX_BITS}")
        return self
