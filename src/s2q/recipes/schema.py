"""The schema of a recipe: one group of keys for each part of a method, unknown keys refused.

Dumping a validated recipe (`Recipe.resolved`) gives every value, defaults included; loading that dump gives it back.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from s2q.calibration import SELECTIONS
from s2q.core.errors import nearest_names
from s2q.core.schemes import MAX_BITS, MIN_BITS, LinearScheme, PerChannel, PerGroup, PerToken, QuantScheme
from s2q.rounding import ROUNDINGS, GPTQOptions
from s2q.transforms import ROTATIONS, STARTS

GPTQ = "gptq"
SEARCH = "search"

_WIDTH_PER_RANK = 12  # in a small linear the branch stays below two thirds of the bytes of 4-bit codes


def _to_number(value: Any) -> Any:
    """Read a number that YAML 1.1 takes for a string: 5e-3 without a point."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Number = Annotated[float, BeforeValidator(_to_number), Field(allow_inf_nan=False)]


def _alpha(value: Any) -> Any:
    """Read a share of 0 to 1 or the word for a search."""
    number = _to_number(value)
    if number == SEARCH or (isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number <= 1):
        return number
    raise ValueError(f"got {value!r}; expected 0 to 1, or {SEARCH}")


Alpha = Annotated[float | Literal["search"], BeforeValidator(_alpha)]


def _one_of(kind: str, options: Iterable[str]) -> AfterValidator:
    """Refuse a name that is not among the options, with the nearest ones."""
    known = sorted(options)

    def check(name: str) -> str:
        if name not in known:
            near = nearest_names(name, known)
            hint = f"nearest names are {', '.join(near)}; " if near else ""
            raise ValueError(f"unknown {kind} {name!r}: {hint}all: {', '.join(known)}")
        return name

    return AfterValidator(check)


Rounding = Annotated[str, _one_of("rounding", (*ROUNDINGS, GPTQ))]


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Grouped(_Group):
    num_bits: int = Field(ge=MIN_BITS, le=MAX_BITS)
    granularity: str
    group_size: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _group_size_fits_granularity(self) -> Self:
        if self.granularity == "per_group" and self.group_size is None:
            raise ValueError("granularity=per_group needs a group_size; use 64, 128 or 256")
        if self.granularity != "per_group" and self.group_size is not None:
            raise ValueError(f"group_size={self.group_size} needs granularity=per_group; got {self.granularity}")
        return self


class WeightsGroup(_Grouped):
    """How weights are quantized: symmetric, static."""

    granularity: Literal["per_channel", "per_group"] = "per_channel"

    def scheme(self) -> QuantScheme:
        """Return the scheme of a weight."""
        granularity = PerChannel() if self.group_size is None else PerGroup(group_size=self.group_size)
        return QuantScheme(num_bits=self.num_bits, granularity=granularity)


class ModulationGroup(WeightsGroup):
    """How the weights of the adaLN linears are quantized; their inputs are not.

    Attributes:
        rounding: "rtn", or "gptq" with the Hessian of their inputs at every timestep; its settings are those of
            `RoundingGroup`.
    """

    rounding: Rounding = "rtn"


class ActivationsGroup(_Grouped):
    """How the inputs of linears are quantized: symmetric, dynamic, each token by itself.

    Attributes:
        granularity: "per_token", one scale each, on integer kernels; "per_group", one for each `group_size` channels of
            a token, which no kernel takes: it is simulated in floating point.
    """

    granularity: Literal["per_token", "per_group"] = "per_token"

    def scheme(self) -> QuantScheme:
        """Return the scheme of an activation."""
        granularity = PerToken() if self.group_size is None else PerGroup(group_size=self.group_size)
        return QuantScheme(num_bits=self.num_bits, granularity=granularity, dynamic=True)


class CalibrationGroup(_Group):
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


class TransformsGroup(_Group):
    """What stands before the linears: a shift, a channel scale, then a rotation.

    Attributes:
        shift: "mean" subtracts the mean of each channel over the calibration samples; the linears' biases make up for
            it, so that inputs of linears without a bias are not shifted.
        scale: "smooth" for SmoothQuant's scale.
        alpha: How much of the outliers goes from the input to the weight; "search" takes for each input of linears the
            one of a grid whose quantized outputs are nearest to the exact ones (`s2q.quantization.students`).
        learn_scale: Whether distillation learns the scale.
        rotation: One of `ROTATIONS`; "kronecker" is learned where there is distillation.
        start: Where a Kronecker rotation starts; one of `STARTS`.
        low_rank: How many directions go to the output in floating point; 0 for none. At most a 12th of the smaller side
            of a linear (see `rank`).
        low_rank_from: Which they are, and what is quantized without them: "input" for the largest of the input after
            shift and scale, "weight" for the top singular vectors of the weights that read it, scaled; "both" takes
            those of the input out of the weights too.
    """

    shift: Literal["none", "mean"] = "none"
    scale: Literal["none", "smooth"] = "none"
    alpha: Alpha = 0.5
    learn_scale: bool = True
    rotation: Annotated[str, _one_of("rotation", ROTATIONS)] = "identity"
    start: Annotated[str, _one_of("start", STARTS)] = "hadamard"
    low_rank: int = Field(default=0, ge=0)
    low_rank_from: Literal["input", "weight", "both"] = "input"

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


class ClipGroup(_Group):
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


class LossGroup(_Group):
    """How distillation weights tokens (eq. 10 and 11)."""

    weighting: Literal["uniform", "attention"] = "uniform"
    lambda_min: Number = Field(default=0.5, ge=0)
    lambda_max: Number = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> LossGroup:
        if self.lambda_min > self.lambda_max:
            raise ValueError(f"loss: lambda_min={self.lambda_min} is above lambda_max={self.lambda_max}; lower it")
        return self


class DistillationGroup(_Group):
    """How a block is optimised: AdamW, cosine schedule, one sample at a time."""

    epochs: int = Field(default=15, ge=1)
    lr: Number = Field(default=5e-3, gt=0)
    clip_lr: Number = Field(default=5e-2, gt=0)
    weight_decay: Number = Field(default=0.0, ge=0)


class RoundingGroup(_Group):
    """How weights are rounded to codes; all but the method are settings of GPTQ (`s2q.rounding.GPTQOptions`)."""

    method: Rounding = "rtn"
    dampening_frac: Number = Field(default=0.01, ge=0)
    block_size: int = Field(default=128, ge=1)
    act_order: bool = True
    max_retries: int = Field(default=4, ge=0)
    allow_fallback: bool = False

    def options(self) -> GPTQOptions:
        """Return the settings of GPTQ."""
        return GPTQOptions(**self.model_dump(exclude={"method"}))


class Recipe(_Group):
    """A method: the parts of a quantization run and their settings.

    Attributes:
        name: Name of the recipe.
        description: One sentence for people.
        weights: Weights of the block linears.
        activations: Inputs of the block linears; None for weight-only.
        modulation: Weights of the adaLN linears, which are always weight-only; None leaves those linears untouched.
        outer: Weights of the linears outside the blocks (text projection, token refiner, timestep embedding, output),
            weight-only and rounded to nearest; None leaves those linears untouched.
        calibration: What the recipe calibrates on, if any of its parts does.
        transforms: What stands before the linears.
        clip: Clipping ratios.
        loss: How distillation weights tokens.
        distillation: How blocks are optimised; None does not optimise.
        rounding: How weights become codes.
        skip: Shell-style patterns of full names of linears to leave untouched, "transformer_blocks.0.*".
    """

    name: str = Field(min_length=1)
    description: str = ""
    weights: WeightsGroup
    activations: ActivationsGroup | None = None
    modulation: ModulationGroup | None = ModulationGroup(num_bits=4)
    outer: WeightsGroup | None = None
    calibration: CalibrationGroup = CalibrationGroup()
    transforms: TransformsGroup = TransformsGroup()
    clip: ClipGroup = ClipGroup()
    loss: LossGroup = LossGroup()
    distillation: DistillationGroup | None = None
    rounding: RoundingGroup = RoundingGroup()
    skip: tuple[str, ...] = ()

    @field_validator("skip", mode="before")
    @classmethod
    def _list_to_tuple(cls, skip: Any) -> Any:
        return tuple(skip) if isinstance(skip, list) else skip

    @model_validator(mode="after")
    def _parts_fit(self) -> Recipe:
        learned = self.clip.weights or self.clip.activations
        if learned and self.distillation is None:
            raise ValueError("learned clip ratios need distillation; set distillation.epochs=15, or clip.constant")
        if self.loss.weighting != "uniform" and self.distillation is None:
            raise ValueError(
                f"loss.weighting={self.loss.weighting} needs distillation; set distillation.epochs=15, or "
                "loss.weighting=uniform"
            )
        if self.activations is None and (self.clip.activations or self.clip.constant is not None):
            raise ValueError("clip ratios of activations need quantized activations; set activations.num_bits")
        scale = self.transforms.scale != "none" and self.transforms.learn_scale
        if self.distillation is not None and not (learned or scale or self.transforms.rotation == "kronecker"):
            raise ValueError(
                "distillation has nothing to learn; set transforms.rotation=kronecker, transforms.scale=smooth or "
                "clip.weights=true"
            )
        return self

    @property
    def calibrates(self) -> bool:
        """Whether the recipe does more than round each weight by itself; it runs on samples then."""
        settings = self.transforms
        before = settings.shift != "none" or settings.scale != "none" or settings.low_rank > 0
        transforms = before or settings.rotation != "identity"
        learns = self.distillation is not None or self.clip.constant is not None
        uses_gptq = GPTQ in (self.rounding.method, None if self.modulation is None else self.modulation.rounding)
        return transforms or learns or uses_gptq

    def resolved(self) -> dict[str, Any]:
        """Return every value as plain data for JSON; validating it gives an equal recipe."""
        return self.model_dump(mode="json")

    def linear_scheme(self) -> LinearScheme:
        """Return the scheme of the ordinary block linears."""
        activation = None if self.activations is None else self.activations.scheme()
        return LinearScheme(weight=self.weights.scheme(), activation=activation)

    def modulation_scheme(self) -> LinearScheme | None:
        """Return the scheme of the adaLN linears, or None if they stay untouched."""
        return None if self.modulation is None else LinearScheme(weight=self.modulation.scheme(), activation=None)

    def outer_scheme(self) -> LinearScheme | None:
        """Return the scheme of the linears outside the blocks, or None if they stay untouched."""
        return None if self.outer is None else LinearScheme(weight=self.outer.scheme(), activation=None)
