"""Classifier-free guidance of a pipeline: whether it has one, how many branches run, and what needs them.

A guidance weight of at most 1 runs one branch. A step-distilled model is run so; one whose guidance was distilled into
the transformer takes the weight as an input and runs one branch at every weight.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from s2q.common.errors import InvalidInputError, short_repr
from s2q.models import family_of

if TYPE_CHECKING:
    from s2q.generation.settings import GenerationSettings


def branches_of(pipe: Any, settings: GenerationSettings) -> int:
    """Return how many guidance branches a step runs: 2 with classifier-free guidance, else 1."""
    embedded = family_of(pipe.transformer).guidance == "embedded"
    return 1 if embedded or settings.guidance_scale <= 1 else 2


def recorded_branches(pipe: Any, settings: GenerationSettings) -> int:
    """Return how many of these branches a recorded call has: all, or the conditional one alone."""
    return 1 if family_of(pipe.transformer).guidance == "apart" else branches_of(pipe, settings)


def with_usable_guidance(pipe: Any, settings: GenerationSettings, *, requested: Collection[str]) -> GenerationSettings:
    """Return settings without those for a guidance that the pipeline does not run.

    Raises:
        InvalidInputError: If one of these was requested, by its name; a second weight of at most 1 runs without too.
    """
    if settings.guidance_scale > 1 and not _has_guidance(pipe):
        if "guidance_scale" in requested:
            raise InvalidInputError(
                f"guidance_scale: got {settings.guidance_scale:g}; {type(pipe).__name__} has no guidance with this "
                "transformer; use 1, or remove it"
            )
        settings = replace(settings, guidance_scale=1.0)
    for name in ("guidance_scale_2", "negative_prompt"):
        value = getattr(settings, name)
        obstacle = None if value is None else guidance_obstacle(pipe, settings, name)
        if obstacle is not None:
            if name in requested and not _runs_without(pipe, settings, name):
                raise InvalidInputError(f"{name}: got {short_repr(value)}; {obstacle}")
            settings = replace(settings, **{name: None})
    return settings


def _has_guidance(pipe: Any) -> bool:
    family = family_of(pipe.transformer)
    if family.guidance == "guider":
        return True
    embeds = family.guidance != "embedded" or bool(getattr(pipe.transformer.config, "guidance_embeds", False))
    return embeds and "guidance_scale" in inspect.signature(type(pipe).__call__).parameters


def _runs_without(pipe: Any, settings: GenerationSettings, name: str) -> bool:
    """Whether a setting is the weight of a second transformer that, like the first, runs without guidance."""
    second = settings.guidance_scale_2 if name == "guidance_scale_2" else None
    is_second = second is not None and pipe.config.get("boundary_ratio") is not None
    return is_second and max(settings.guidance_scale, second) <= 1


def guidance_obstacle(pipe: Any, settings: GenerationSettings, name: str) -> str | None:
    """Return the reason why a setting that depends on guidance cannot be used; None if there is none."""
    if name == "guidance_scale_2" and pipe.config.get("boundary_ratio") is None:
        return f"{type(pipe).__name__} denoises with one transformer here; remove it"
    if branches_of(pipe, settings) == 2:
        return None
    if family_of(pipe.transformer).guidance == "embedded":
        return f"guidance is distilled into the transformer of {type(pipe).__name__}, which runs one branch; remove it"
    return f"guidance_scale={settings.guidance_scale:g} runs without guidance; use a weight above 1, or remove it"
