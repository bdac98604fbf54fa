"""The schema of a recipe: one group of keys for each part of a method, unknown keys refused.

Dumping a validated recipe (`Recipe.resolved`) gives every value, defaults included; loading that dump gives it back.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from s2q.core.errors import nearest_names
from s2q.core.schemes import MAX_BITS, MIN_BITS, LinearScheme, PerChannel, PerGroup, PerToken, QuantScheme
from s2q.rounding import ROUNDINGS


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class WeightsGroup(_Group):
    """How weights are quantized: symmetric, static."""

    num_bits: int = Field(ge=MIN_BITS, le=MAX_BITS)
    granularity: Literal["per_channel", "per_group"] = "per_channel"
    group_size: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _group_size_fits_granularity(self) -> WeightsGroup:
        if self.granularity == "per_group" and self.group_size is None:
            raise ValueError("granularity=per_group needs a group_size; use 64, 128 or 256")
        if self.granularity == "per_channel" and self.group_size is not None:
            raise ValueError(f"group_size={self.group_size} needs granularity=per_group; got per_channel")
        return self

    def scheme(self) -> QuantScheme:
        """Return the scheme of a weight."""
        granularity = PerChannel() if self.group_size is None else PerGroup(group_size=self.group_size)
        return QuantScheme(num_bits=self.num_bits, granularity=granularity)


class ActivationsGroup(_Group):
    """How the inputs of linears are quantized: symmetric, per token, dynamic."""

    num_bits: int = Field(ge=MIN_BITS, le=MAX_BITS)

    def scheme(self) -> QuantScheme:
        """Return the scheme of an activation."""
        return QuantScheme(num_bits=self.num_bits, granularity=PerToken(), dynamic=True)


class RoundingGroup(_Group):
    """How weights are rounded to codes."""

    method: str = "rtn"

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        if method not in ROUNDINGS:
            near = nearest_names(method, ROUNDINGS)
            hint = f"nearest names are {', '.join(near)}; " if near else ""
            raise ValueError(f"unknown rounding {method!r}: {hint}all: {', '.join(sorted(ROUNDINGS))}")
        return method


class Recipe(_Group):
    """A method: the parts of a quantization run and their settings.

    Attributes:
        name: Name of the recipe.
        description: One sentence for people.
        weights: Weights of the block linears.
        activations: Inputs of the block linears; None for weight-only.
        modulation: Weights of the adaLN linears, which are always weight-only; None leaves those linears untouched.
        rounding: How weights become codes.
        skip: Shell-style patterns of full names of linears to leave untouched, "transformer_blocks.0.*".
    """

    name: str = Field(min_length=1)
    description: str = ""
    weights: WeightsGroup
    activations: ActivationsGroup | None = None
    modulation: WeightsGroup | None = WeightsGroup(num_bits=4)
    rounding: RoundingGroup = RoundingGroup()
    skip: tuple[str, ...] = ()

    @field_validator("skip", mode="before")
    @classmethod
    def _list_to_tuple(cls, skip: Any) -> Any:
        return tuple(skip) if isinstance(skip, list) else skip

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
