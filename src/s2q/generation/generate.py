"""Generating videos for evaluation and for the command line, in batches whose members do not know each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from s2q.common.arguments import model_argument, optional, prompt_list, seed_numbers, whole_number, word
from s2q.common.errors import InvalidInputError, UsageError, memory_errors
from s2q.common.progress import Progress, StageCounter
from s2q.common.torch_state import in_fresh_torch_state
from s2q.generation.defaults import generation_defaults
from s2q.generation.denoise import DenoisingResult, denoise
from s2q.generation.load import load_pipeline, refuse_load_options
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

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_BATCH_TOKENS = 4096
_MAX_BATCH = 16
LESS_MEMORY = (
    "use smaller or shorter videos (height, width, num_frames), fewer at once (batch_size), dtype bfloat16, or offload "
    "(enable_model_cpu_offload of the pipeline)"
)
"""Remedy for lack of memory while generating."""


@dataclass(frozen=True, kw_only=True)
class Video:
    """One generated video, on the CPU: frames `[F, H, W, 3]`, uint8; final latents `[f, C, h, w]`, float32."""

    prompt: str
    seed: int
    frames: torch.Tensor
    latents: torch.Tensor


@memory_errors("generating videos", remedy=LESS_MEMORY)
@in_fresh_torch_state
def generate(
    model: str | Path | ModelSource | DiffusionPipeline,
    *,
    prompts: Sequence[str],
    seeds: Sequence[int] = (0,),
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int | None = None,
    device: str | torch.device | int = "cpu",
    dtype: torch.dtype | str | None = None,
    variant: str | None = None,
    verify: bool | None = None,
    backend: str = "auto",
    attention_backend: str | None = None,
    progress: Progress | None = None,
) -> list[Video]:
    """Generate one video for every prompt and seed.

    A video depends on its prompt, its seed, the settings and the model; the batch it is computed in changes it by
    floating-point rounding only. Threads may call it with one pipeline: they take turns.

    Args:
        model: A pipeline, the name or folder of one, or a resolved source. `device`, `dtype`, `variant`, `verify` and
            the backends are for models that are loaded here; see `s2q.load`.
        seeds: Every prompt is generated with every seed.
        num_frames: None takes the model's own, as for `height`, `width`, `num_inference_steps` and `guidance_scale`.
        batch_size: Videos per batch; by default as many as hold 4,096 video tokens together, 1 to 16.

    Returns:
        The videos, prompt by prompt, each prompt's in the order of the seeds.

    Raises:
        InvalidInputError: A prompt, a seed, a size or another setting does not fit the model, or its pipeline needs
            more than prompts.
        S2QError: The model produced NaN or infinite latents.
    """
    model, seeds = model_argument("model", model), seed_numbers(seeds)
    prompts = prompt_list("prompts", prompts)
    requested = requested_settings(
        num_frames=num_frames, height=height, width=width, steps=num_inference_steps, guidance=guidance_scale
    )
    batch_size = optional(whole_number, "batch_size", batch_size, least=1)
    pipe = model
    if not isinstance(model, str | Path | ModelSource):
        refuse_load_options("generate", dtype=dtype, variant=variant, verify=verify)
        if backend != "auto" or attention_backend is not None:
            raise UsageError("generate: backends are for models by name or folder; see s2q.load")
    else:
        model = resolve_model(model, variant=optional(word, "variant", variant))
        pipe = load_pipeline(
            model, dtype=dtype, device=device, verify=verify, backend=backend, attention_backend=attention_backend
        )
    resolved = settings_for(pipe, requested, defaults=generation_defaults(model))
    check_prompts(pipe, prompts)
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    size = batch_size or batch_size_for(pipe, resolved)
    tick = StageCounter(progress, "generate", -(-len(jobs) // size) * resolved.num_inference_steps)
    videos: list[Video] = []
    for names, numbers in batched(jobs, size):
        result = denoise(pipe, names, seeds=numbers, settings=resolved, step_done=tick)
        videos += videos_of(names, numbers, result)
    return videos


def videos_of(prompts: Sequence[str], seeds: Sequence[int], result: DenoisingResult | Trajectory) -> list[Video]:
    """Return the videos of one decoded batch, one for each prompt and seed."""
    assert result.frames is not None
    rows = zip(prompts, seeds, result.frames, result.latents, strict=True)
    return [Video(prompt=prompt, seed=seed, frames=frames, latents=latents) for prompt, seed, frames, latents in rows]


def settings_for(pipe: Any, requested: Mapping[str, Any], *, defaults: Mapping[str, Any]) -> GenerationSettings:
    """Return checked settings from what was asked for and what the model's makers recommend."""
    if not takes_prompts_alone(pipe):
        raise InvalidInputError(
            f"{type(pipe).__name__}: s2q generates from prompts only, with "
            f"{family_of(pipe.transformer).pipeline_class}; load the pipeline and call it with an image in Python"
        )
    return resolve_settings(pipe, requested=requested, defaults=defaults)


def batch_size_for(pipe: Any, settings: GenerationSettings) -> int:
    """Return how many videos to compute at once: as many as hold 4,096 video tokens together, 1 to 16."""
    return max(1, min(_MAX_BATCH, _BATCH_TOKENS // video_tokens(pipe, settings)))


def batched(jobs: Sequence[tuple[str, int]], size: int) -> Iterator[tuple[list[str], list[int]]]:
    """Yield the prompts and the seeds of at most `size` jobs after another."""
    for start in range(0, len(jobs), size):
        batch = jobs[start : start + size]
        yield [prompt for prompt, _ in batch], [seed for _, seed in batch]
