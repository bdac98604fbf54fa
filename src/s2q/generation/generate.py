"""Generating videos for evaluation and for the command line, in batches whose members do not know each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from s2q.common.arguments import (
    model_argument,
    optional_text,
    prompt_list,
    seed_numbers,
    whole_number,
)
from s2q.common.errors import InvalidInputError, memory_errors
from s2q.common.progress import Progress, StageCounter
from s2q.common.torch_state import in_fresh_torch_state
from s2q.generation.defaults import generation_defaults
from s2q.generation.denoise import DenoisingResult, denoise
from s2q.generation.load import load_pipeline
from s2q.generation.settings import (
    GenerationSettings,
    check_prompts,
    requested_settings,
    resolve_settings,
    takes_prompts_alone,
    video_tokens,
)
from s2q.generation.trajectory import Trajectory
from s2q.models import ModelSource, family_of, resolve_model

_BATCH_TOKENS = 4096
_MAX_BATCH = 16
LESS_MEMORY = (
    "use smaller or shorter videos (height, width, num_frames), fewer at once (batch_size), dtype bfloat16, or offload "
    "(enable_model_cpu_offload of the pipeline)"
)
"""Remedy for lack of memory while generating."""


@dataclass(frozen=True, kw_only=True)
class Video:
    """One generated video.

    Attributes:
        prompt: Its prompt.
        seed: Its seed.
        frames: Frames `[F, H, W, 3]`, uint8, on the CPU.
        latents: Final latents `[f, C, h, w]`, float32, on the CPU.
    """

    prompt: str
    seed: int
    frames: torch.Tensor
    latents: torch.Tensor


@memory_errors("generating videos", remedy=LESS_MEMORY)
@in_fresh_torch_state
def generate(
    model: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int] = (0,),
    settings: GenerationSettings | Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    variant: str | None = None,
    progress: Progress | None = None,
) -> list[Video]:
    """Generate one video for every prompt and seed.

    A video depends on its prompt, its seed, the settings and the model; the batch it is computed in changes it by
    floating-point rounding only.

    Args:
        model: A pipeline, the name or folder of one, or a resolved source.
        prompts: The prompts.
        seeds: Every prompt is generated with every seed.
        settings: Generation settings; missing ones are the model's own.
        batch_size: Videos per batch; by default as many as hold 4,096 video tokens together, 1 to 16.
        variant: Variant of the weights of a model by name, "fp16".
        progress: Called after every denoising step.

    Returns:
        The videos, prompt by prompt, each prompt's in the order of the seeds.

    Raises:
        InvalidInputError: A prompt, a seed, a size or another setting does not fit the model, or its pipeline needs
            more than prompts.
        S2QError: The model produced NaN or infinite latents.
    """
    model, prompts, seeds = model_argument("model", model), prompt_list(prompts), seed_numbers(seeds)
    settings, variant = requested_settings(settings), optional_text("variant", variant)
    if batch_size is not None:
        whole_number("batch_size", batch_size, least=1)
    if isinstance(model, (str, Path)):
        model = resolve_model(model, variant=variant)
    pipe = load_pipeline(model) if isinstance(model, ModelSource) else model
    resolved = settings_for(pipe, settings, defaults=generation_defaults(model))
    check_prompts(pipe, prompts)
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    size = batch_size_for(pipe, resolved, batch_size)
    tick = StageCounter(progress, "generate", -(-len(jobs) // size) * resolved.num_inference_steps)
    videos: list[Video] = []
    for batch in batched(jobs, size):
        names, numbers = [prompt for prompt, _ in batch], [seed for _, seed in batch]
        result = denoise(pipe, names, seeds=numbers, settings=resolved, step_done=tick)
        videos += videos_of(names, numbers, result)
    return videos


def videos_of(prompts: Sequence[str], seeds: Sequence[int], result: DenoisingResult | Trajectory) -> list[Video]:
    """Return the videos of one decoded batch, one for each prompt and seed."""
    assert result.frames is not None
    rows = zip(prompts, seeds, result.frames, result.latents, strict=True)
    return [Video(prompt=prompt, seed=seed, frames=frames, latents=latents) for prompt, seed, frames, latents in rows]


def settings_for(
    pipe: Any, settings: GenerationSettings | Mapping[str, Any] | None, *, defaults: Mapping[str, Any]
) -> GenerationSettings:
    """Return checked settings from what was asked for and what the model's makers recommend.

    Raises:
        InvalidInputError: A setting does not fit the model, or its pipeline needs more than prompts.
    """
    if not takes_prompts_alone(pipe):
        raise InvalidInputError(
            f"{type(pipe).__name__}: s2q generates from prompts only, with "
            f"{family_of(pipe.transformer).pipeline_class}; load the pipeline and call it with an image in Python"
        )
    return resolve_settings(pipe, requested=requested_settings(settings), defaults=defaults)


def batch_size_for(pipe: Any, settings: GenerationSettings, requested: int | None) -> int:
    """Return how many videos to compute at once.

    Raises:
        InvalidInputError: `requested` is no whole number of at least 1.
    """
    if requested is not None:
        return whole_number("batch_size", requested, least=1)
    return max(1, min(_MAX_BATCH, _BATCH_TOKENS // video_tokens(pipe, settings)))


def batched(jobs: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Yield consecutive slices of at most `size` jobs."""
    for start in range(0, len(jobs), size):
        yield jobs[start : start + size]
