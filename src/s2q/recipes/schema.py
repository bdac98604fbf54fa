"""The schema of a recipe: its groups of keys, and which of them go together.

Dumping a validated recipe (`Recipe.resolved`) gives every value, defaults included; loading that dump gives it back.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from s2q.core.schemes import UNIFORM, LinearScheme
from s2q.recipes.groups import (
    ADAROUND,
    GPTQ,
    ActivationsGroup,
    AllocationGroup,
    CalibrationGroup,
    ClipGroup,
    DistillationGroup,
    Group,
    LossGroup,
    ModulationGroup,
    RefinementGroup,
    RoundingGroup,
    TransformsGroup,
    WeightsGroup,
    to_tuple,
)

MAX_NAME = 200


class Recipe(Group):
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
        refinement: How what scales and corrects the codes is learned; None leaves it as rounding found it.
        allocation: Group sizes or bits given to the block linears one by one, in place of what `weights` says (and
            `activations`, of group sizes); None gives all of them the same.
        skip: Shell-style patterns of full names of linears to leave untouched, "transformer_blocks.0.*".
    """

    name: str = Field(min_length=1, max_length=MAX_NAME)
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
    refinement: RefinementGroup | None = None
    allocation: AllocationGroup | None = None
    skip: Annotated[tuple[str, ...], BeforeValidator(to_tuple)] = ()

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
        if settings.salience != "max" and settings.scale == "none":
            raise ValueError(f"transforms.salience={settings.salience} needs transforms.scale=smooth")
        transforms = settings.rotation == "kronecker" or (settings.scale != "none" and settings.learn_scale)
        self._learned_rounding_fits(transforms=transforms)
        rounding = self.rounding.method == ADAROUND
        if self.distillation is not None and not (learned or transforms or rounding):
            raise ValueError(
                "distillation has nothing to learn; set transforms.rotation=kronecker, transforms.scale=smooth, "
                "clip.weights=true or rounding.method=adaround"
            )
        if self.refinement is not None and self.transforms.estimator:
            raise ValueError("refinement does not know estimators; set refinement=null, or transforms.estimator=false")
        return self

    @model_validator(mode="after")
    def _allocation_fits(self) -> Recipe:
        if self.allocation is None:
            return self
        key = "num_bits" if self.allocation.what == "weight_bits" else "group_size"
        sides = {"weights": self.weights}
        if key == "group_size" and self.activations is not None and self.activations.group_size is not None:
            sides["activations"] = self.activations
        for name, side in sides.items():
            given = getattr(side, key)
            if given not in self.allocation.candidates:
                raise ValueError(
                    f"{name}.{key}={given} is none of allocation.candidates={list(self.allocation.candidates)}, which "
                    f"take its place; set it to one of them{'' if given else ', with granularity=per_group'}"
                )
        return self

    def _learned_rounding_fits(self, *, transforms: bool) -> None:
        if self.rounding.method != ADAROUND:
            return
        if self.distillation is None:
            raise ValueError("rounding.method=adaround needs distillation; set distillation.epochs=15")
        if self.weights.levels != UNIFORM:
            raise ValueError("rounding.method=adaround rounds to uniform levels; set weights.levels=uniform")
        if self.clip.weights or transforms:
            raise ValueError(
                "rounding.method=adaround learns how given weights are rounded, so that nothing may change them "
                "meanwhile; set clip.weights=false, transforms.learn_scale=false and transforms.rotation=hadamard or "
                "identity"
            )

    @property
    def calibrates(self) -> bool:
        """Whether a part of the recipe needs samples: not a fixed rotation, a constant clip or rounding to nearest."""
        settings = self.transforms
        measures = settings.shift != "none" or settings.scale != "none" or settings.low_rank > 0
        uses_gptq = GPTQ in (self.rounding.method, None if self.modulation is None else self.modulation.rounding)
        return measures or self.learns or uses_gptq or self.allocation is not None

    @property
    def learns(self) -> bool:
        """Whether something is learned from the samples, which takes passes with gradients."""
        return self.distillation is not None or self.refinement is not None

    @property
    def epochs(self) -> int:
        """How often all samples are learned from."""
        return sum(group.epochs for group in (self.distillation, self.refinement) if group is not None)

    @property
    def needs_grid(self) -> bool:
        """Whether the run has to know where the video tokens lie."""
        delta = self.activations is not None and self.activations.delta is not None
        return delta or self.transforms.estimator or self.loss.temporal > 0

    def resolved(self) -> dict[str, Any]:
        """Return every value as plain data for JSON; validating it gives an equal recipe."""
        return self.model_dump(mode="json")

    def linear_scheme(self, *, of_text: bool = False) -> LinearScheme:
        """Return the scheme of the ordinary block linears.

        Args:
            of_text: Whether it is that of the ones that see text tokens alone.
        """
        activation = None if self.activations is None else self.activations.scheme(of_text=of_text)
        return LinearScheme(weight=self.weights.scheme(), activation=activation)

    def modulation_scheme(self) -> LinearScheme | None:
        """Return the scheme of the adaLN linears, or None if they stay untouched."""
        return None if self.modulation is None else LinearScheme(weight=self.modulation.scheme(), activation=None)

    def outer_scheme(self) -> LinearScheme | None:
        """Return the scheme of the linears outside the blocks, or None if they stay untouched."""
        return None if self.outer is None else LinearScheme(weight=self.outer.scheme(), activation=None)
