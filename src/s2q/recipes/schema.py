"""The schema of a recipe: its groups of keys, and which of them go together.

Dumping a validated recipe (`Recipe.resolved`) gives every value, defaults included; loading that dump gives it back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, TypeAdapter, model_validator

from s2q.common.errors import short_repr
from s2q.common.options import Options, expected_one_of
from s2q.core.schemes import (
    MAX_BITS,
    MIN_BITS,
    TABLES,
    UNIFORM,
    ActivationOptions,
    AttentionOptions,
    LinearScheme,
    WeightOptions,
)
from s2q.distillation.loss import Loss
from s2q.distillation.options import Distillation, Refinement
from s2q.nn import Clip
from s2q.rounding import ROUNDINGS, RTN, Rounding
from s2q.selection.options import Calibration
from s2q.transforms import Transforms

MAX_NAME = 200
_WIDE = 8


@dataclass(frozen=True, kw_only=True)
class ModulationOptions(WeightOptions):
    """Options of the adaLN linears, weight-only.

    Attributes:
        rounding: "rtn", or one of `ROUNDINGS` with a Hessian, "gptq", which takes it from the inputs at every timestep;
            its options are those of the recipe's `rounding`, if that has the same method.
        correct_bias: Whether biases take what rounding to nearest changes of the output at the mean input, which is
            known without samples where adaLN reads the timestep alone (CogVideoX); elsewhere they stay.
    """

    rounding: str = "rtn"
    correct_bias: bool = False

    def __post_init__(self) -> None:
        """Check the name of the rounding."""
        super().__post_init__()
        names = [name for name, rounding in ROUNDINGS.items() if name == RTN.method or rounding.needs_hessian]
        if self.rounding not in names:
            raise self.invalid(f"rounding={short_repr(self.rounding)}; {expected_one_of(self.rounding, names)}")
        if self.correct_bias and self.rounding != RTN.method:
            raise self.invalid(f"correct_bias=true with rounding={self.rounding}; use {RTN.method}, or omit it")


@dataclass(frozen=True, kw_only=True)
class AllocationOptions(Options):
    """Options of the per-linear allocation of bits or group sizes.

    Attributes:
        what: "group_size" of weights, and of activations if those are grouped; or "weight_bits".
        candidates: The values; of group sizes, those that divide its in features are candidates of a linear.
        budget: Bits that a weight of these linears takes at most, on the average, as stored: scales count, and codes of
            5 to 8 bits take a byte.
        samples: Calibration samples on which the effect of a candidate on a block is measured.
    """

    what: Literal["group_size", "weight_bits"]
    candidates: tuple[int, ...] = field(metadata={"strict": False})
    budget: float = field(metadata={"gt": 0})
    samples: int = field(default=8, metadata={"ge": 1})

    def __post_init__(self) -> None:
        """Check the candidates."""
        super().__post_init__()
        given = f"candidates={short_repr(list(self.candidates))}"
        if len(self.candidates) < 2 or len(set(self.candidates)) < len(self.candidates) or min(self.candidates) < 1:
            raise self.invalid(f"{given}; expected at least two different whole numbers above 0")
        if self.what == "weight_bits" and not all(MIN_BITS <= bits <= MAX_BITS for bits in self.candidates):
            raise self.invalid(f"{given}; expected bits, each {MIN_BITS} to {MAX_BITS}")


def _read_rounding(value: Any) -> Rounding:
    """Read the options of the rounding that `method` names; a method without keys has its defaults."""
    if isinstance(value, Rounding):
        return value
    method = value.get("method", RTN.method) if isinstance(value, Mapping) else RTN.method
    if not isinstance(method, str) or method not in ROUNDINGS:
        raise Rounding.invalid(f"method={short_repr(method)}; {expected_one_of(method, ROUNDINGS)}")
    return TypeAdapter(ROUNDINGS[method]).validate_python(value)


class Recipe(BaseModel):
    """A method: the parts of a quantization run and their settings.

    Attributes:
        weights: Of the block linears.
        activations: Of the block linears; None for weight-only.
        modulation: Weights of the adaLN linears, which are always weight-only; None leaves those linears untouched.
        outer: Weights of the linears outside the blocks (text projection, token refiner, timestep embedding), except
            those that read or return latents; weight-only, rounded to nearest. None leaves those linears untouched, as
            skipping all linears of the blocks does.
        text_encoder: Weights of the linears of text encoders; weight-only, rounded to nearest. None leaves these
            untouched.
        attention: Of the blocks, in the checkpoint; blocks are calibrated with full precision. None quantizes nothing.
        distillation: None learns nothing.
        refinement: None learns nothing after rounding.
        allocation: None gives all block linears what `weights` and `activations` say.
        skip: Shell-style patterns of full names of linears to leave untouched, "transformer_blocks.0.*"; attention
            modules whose names match are left too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = Field(min_length=1, max_length=MAX_NAME)
    description: str = ""
    weights: WeightOptions
    activations: ActivationOptions | None = None
    modulation: ModulationOptions | None = ModulationOptions(num_bits=4)
    outer: WeightOptions | None = None
    text_encoder: WeightOptions | None = None
    attention: AttentionOptions | None = None
    calibration: Calibration = Calibration()
    transforms: Transforms = Transforms()
    clip: Clip = Clip()
    loss: Loss = Loss()
    distillation: Distillation | None = None
    rounding: Annotated[Rounding, PlainValidator(_read_rounding), PlainSerializer(asdict)] = RTN()
    refinement: Refinement | None = None
    allocation: AllocationOptions | None = None
    skip: Annotated[tuple[str, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _parts_fit(self) -> Recipe:
        learned = self.clip.weights or self.clip.activations or self.transforms.estimator
        if learned and self.distillation is None:
            raise ValueError(
                "learned clip ratios and estimators need distillation; set distillation.epochs=15, or clip.constant"
            )
        if self.loss.weighting != "uniform" and self.distillation is None:
            raise ValueError(
                f"loss.weighting={self.loss.weighting} needs distillation; set distillation.epochs=15, or "
                "loss.weighting=uniform"
            )
        if self.loss.temporal > 0 and self.distillation is None:
            raise ValueError("loss.temporal needs distillation; set distillation.epochs=15, or loss.temporal=0")
        if self.activations is None and (self.clip.activations or self.clip.constant is not None):
            off = "clip.activations=false" if self.clip.activations else "clip.constant=null"
            raise ValueError(
                f"clip ratios of activations need quantized activations; set {off}, or activations.num_bits"
            )
        settings = self.transforms
        transforms = settings.rotation == "kronecker" or (settings.scale != "none" and settings.learn_scale)
        self._learned_rounding_fits(transforms=transforms)
        if self.distillation is not None and not (learned or transforms or self.rounding.learned):
            raise ValueError(
                "distillation has nothing to learn; set transforms.rotation=kronecker, transforms.scale=smooth, "
                "clip.weights=true or rounding.method=adaround"
            )
        if self.refinement is not None and self.transforms.estimator:
            raise ValueError(
                "refinement does not support estimators; set refinement=null, or transforms.estimator=false"
            )
        return self

    @model_validator(mode="after")
    def _table_fits(self) -> Recipe:
        if self.weights.levels in TABLES and self.clip.weights:
            raise ValueError(
                f"clip.weights=true does not support weights.levels={self.weights.levels}, whose scales are searched; "
                "set clip.weights=false"
            )
        return self

    @model_validator(mode="after")
    def _allocation_fits(self) -> Recipe:
        if self.allocation is None:
            return self
        if self.calibration.trajectory_2 == "quantized":
            raise ValueError(
                "allocation measures both transformers before either is quantized; set "
                "calibration.trajectory_2=full_precision, or allocation=null"
            )
        key = "num_bits" if self.allocation.what == "weight_bits" else "group_size"
        sides = {"weights": self.weights}
        if key == "group_size" and self.activations is not None and self.activations.group_size is not None:
            sides["activations"] = self.activations
        for name, side in sides.items():
            given = getattr(side, key)
            if given not in self.allocation.candidates:
                raise ValueError(
                    f"{name}.{key}={given} is none of allocation.candidates={list(self.allocation.candidates)}, which "
                    f"replace it; set it to one of them{'' if given else ', with granularity=per_group'}"
                )
        return self

    def _learned_rounding_fits(self, *, transforms: bool) -> None:
        if not self.rounding.learned:
            return
        given = f"rounding.method={self.rounding.method}"
        if self.distillation is None:
            raise ValueError(f"{given} needs distillation; set distillation.epochs=15")
        if self.weights.levels != UNIFORM:
            raise ValueError(f"{given} rounds to uniform levels; set weights.levels=uniform")
        if self.clip.weights or transforms:
            raise ValueError(
                f"{given} learns the rounding of fixed weights, so nothing else may change them; set "
                "clip.weights=false, transforms.learn_scale=false and transforms.rotation=hadamard or "
                "identity"
            )

    @property
    def calibrates(self) -> bool:
        """Whether a part of the recipe needs samples; fixed rotations, column scales, rounding to nearest do not."""
        settings = self.transforms
        measures = settings.shift != "none" or settings.scale == "smooth" or settings.low_rank > 0
        by_hessian = self.rounding.needs_hessian or self.modulation_rounding.needs_hessian
        return measures or self.learns or by_hessian or self.allocation is not None

    def calibration_dtype(self, model: torch.dtype, *, bf16_products: bool) -> torch.dtype:
        """Return the dtype that blocks are calibrated in, from that of the model.

        "auto" is bf16 on a device that multiplies it (`devices.has_bf16_products`), and fp32 elsewhere and where
        weights and inputs have 8 bits: the error of such a block is as small as that of computing it in bf16.
        """
        small = min(self.weights.num_bits, self.activations.num_bits if self.activations else _WIDE) >= _WIDE
        auto = torch.bfloat16 if bf16_products and not small else torch.float32
        named = {"auto": auto, "float32": torch.float32, "bfloat16": torch.bfloat16, "model": model}
        return named[self.calibration.precision]

    @property
    def corrects_biases(self) -> bool:
        """Whether biases of modulation linears are corrected where the model says what these read."""
        return self.modulation is not None and self.modulation.correct_bias

    @property
    def modulation_rounding(self) -> Rounding:
        """The rounding of the adaLN linears, with the options of `rounding` if the method is the same."""
        method = "rtn" if self.modulation is None else self.modulation.rounding
        return self.rounding if self.rounding.method == method else ROUNDINGS[method]()

    @property
    def learns(self) -> bool:
        """Whether something is learned from the samples, which takes passes with gradients."""
        return self.distillation is not None or self.refinement is not None

    @property
    def epochs(self) -> int:
        """Epochs over the samples, of distillation and refinement together."""
        return sum(group.epochs for group in (self.distillation, self.refinement) if group is not None)

    @property
    def needs_grid(self) -> bool:
        """Whether the run needs the positions of the video tokens."""
        return self.cube_frames is not None or self.compares_frames

    @property
    def cube_frames(self) -> int | None:
        """Frames of the cubes of video tokens that inputs are quantized in; None if each token is by itself."""
        return None if self.activations is None or self.activations.delta is None else self.activations.delta.cube[0]

    @property
    def compares_frames(self) -> bool:
        """Whether what is learned needs all frames of a video at once."""
        return self.transforms.estimator or self.loss.temporal > 0

    def resolved(self) -> dict[str, Any]:
        """Return every value as plain data for JSON; validating it gives an equal recipe."""
        return self.model_dump(mode="json")

    def linear_scheme(self, *, of_text: bool = False) -> LinearScheme:
        """Return the scheme of the ordinary block linears, or of those that see text tokens alone."""
        activation = None if self.activations is None else self.activations.scheme(of_text=of_text)
        return LinearScheme(weight=self.weights.scheme(), activation=activation)
