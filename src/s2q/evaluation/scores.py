"""Scores of single videos as plain data, so that separate parts can be merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import ConfigDict, TypeAdapter

from s2q.generation.settings import GenerationSettings


@dataclass(frozen=True, kw_only=True)
class VideoScores:
    """Everything measured on one video; a metric that does not apply is None, velocity that was not measured empty."""

    prompt: str
    seed: int
    metrics: Mapping[str, float | None]
    velocity_steps: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Scores of a model on some prompts, before averaging.

    Attributes:
        inputs: Each prompt with what belongs to it, by `generation.prompts.prompt_record`.
        floor: Each full-precision video against the one of the same prompt with the seed before: what another seed
            alone changes. Empty with a single seed a prompt.
        timesteps: Timestep of every recorded step; empty without velocity error.
    """

    model: str
    reference: str
    inputs: tuple[Any, ...]
    videos: tuple[VideoScores, ...]
    floor: tuple[VideoScores, ...]
    settings: GenerationSettings
    dtype: str
    timesteps: tuple[float, ...]

    __pydantic_config__ = ConfigDict(extra="forbid")

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, from which `from_dict` makes an equal object."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> EvaluationResult:
        """Read what `to_dict` wrote."""
        return TypeAdapter(cls).validate_python(fields)


def merge(parts: Sequence[EvaluationResult]) -> EvaluationResult:
    """Put together what was measured on sets of prompts, at least one, with the same model, reference and settings."""
    first = parts[0]
    for part in parts[1:]:
        assert (part.model, part.reference) == (first.model, first.reference)
        assert (part.settings, part.dtype) == (first.settings, first.dtype)
    return replace(
        first,
        inputs=tuple(prompt for part in parts for prompt in part.inputs),
        videos=tuple(video for part in parts for video in part.videos),
        floor=tuple(pair for part in parts for pair in part.floor),
        timesteps=next((part.timesteps for part in parts if part.timesteps), ()),
    )
