"""The two sides of an evaluation: the reference generates and is recorded, a model generates and is scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from s2q.common import arguments
from s2q.common.components import transformers_of
from s2q.common.devices import free_memory
from s2q.common.errors import memory_errors
from s2q.common.progress import Progress, StageCounter, Tick
from s2q.common.torch_state import in_fresh_torch_state
from s2q.evaluation import velocity
from s2q.evaluation.judges.learned import Judges
from s2q.evaluation.recordings import DISK_SHARE, Recordings
from s2q.evaluation.scores import EvaluationResult, VideoScores
from s2q.evaluation.settings import EvaluationSettings
from s2q.evaluation.video_metrics import VELOCITY, judge_video, noise_pairs, selected_metrics
from s2q.generation.conditioning import starting_image
from s2q.generation.defaults import (
    generation_defaults,
    model_label,
    with_first_frames,
)
from s2q.generation.denoise import denoise
from s2q.generation.generate import LESS_MEMORY, Video, batch_size_for, batched, settings_for, videos_of
from s2q.generation.load import (
    load_pipeline,
)
from s2q.generation.prompts import check_distinct, prompt_record
from s2q.generation.settings import GenerationSettings, check_prompts
from s2q.generation.trajectory import record_trajectory
from s2q.models import ModelSource, resolve_model
from s2q.models.architecture import Architecture, architecture_of, check_comparable

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

VideoDone = Callable[[str, Video], None]
"""A callback: it gets the label of a model (`model_label`) and a generated video."""


@dataclass(frozen=True, kw_only=True)
class ReferenceRun:
    """Videos and recorded calls of the full-precision model, with which any number of models is compared.

    `wanted` are the metrics to compute, `images` what the videos of a prompt start from; there are no `recordings`
    without velocity error.
    """

    settings: EvaluationSettings
    architecture: Architecture
    wanted: tuple[str, ...]
    generation: GenerationSettings
    dtype: torch.dtype
    batch_size: int
    videos: tuple[Video, ...]
    images: Mapping[str, torch.Tensor | None]
    recordings: Recordings
    judges: Judges
    floor: tuple[VideoScores, ...]


@memory_errors("evaluating the reference", remedy=LESS_MEMORY)
@in_fresh_torch_state
def run_reference(
    reference: Any,
    *,
    pipe: DiffusionPipeline | None = None,
    judges: Judges | None = None,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: EvaluationSettings,
    disk_share: float = DISK_SHARE,
    video_done: VideoDone | None = None,
    progress: Progress | None = None,
) -> ReferenceRun:
    """Generate the full-precision videos and record the calls of the transformer; see `evaluate`.

    Args:
        pipe: The pipeline of a reference by name, if it is loaded already; it stays so.
        judges: The learned judges of the settings, if they are loaded already.
    """
    wanted = check_request(prompts, settings)
    judges = judges or settings.open_judges()
    reference = resolved(reference, settings)
    prompts = with_first_frames(reference, prompts)
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    opened, pipe = pipe, pipe or open_model(reference, settings, dtype=settings.dtype)
    recommended = generation_defaults(reference) | dict(settings.recommended)
    generation = settings_for(pipe, settings.requested, defaults=recommended)
    check_prompts(pipe, prompts, generation)
    size = batch_size_for(pipe, generation, asked=settings.batch_size)
    tick = _counter("full precision", len(jobs), size, generation, progress)
    videos: list[Video] = []
    recordings = Recordings(memory_bytes=settings.trajectory_bytes, disk_share=disk_share)
    for names, numbers in batched(jobs, size):
        if VELOCITY in wanted and recordings.has_room():
            result: Any = record_trajectory(
                pipe, names, seeds=numbers, settings=generation, decode=True, step_done=tick
            )
            recordings.add(result)
        else:
            result = denoise(pipe, names, seeds=numbers, settings=generation, step_done=tick)
            if VELOCITY in wanted:
                recordings.skip()
        videos += _report_videos(videos_of(names, numbers, result), reference, video_done)
    height, width = videos[0].frames.shape[1:3]
    run = ReferenceRun(
        settings=settings,
        architecture=architecture_of(pipe, label=model_label(reference)),
        wanted=wanted,
        generation=generation,
        dtype=pipe.transformer.dtype,
        batch_size=size,
        videos=tuple(videos),
        images={prompt: starting_image(pipe, prompt, height=height, width=width) for prompt in prompts},
        recordings=recordings,
        judges=judges,
        floor=tuple(noise_pairs(videos, judges=judges, wanted=wanted)),
    )
    if pipe not in (reference, opened):
        del pipe
        free_memory()
    return run


@memory_errors("evaluating a model", remedy=LESS_MEMORY)
@in_fresh_torch_state
def judge_model(
    model: Any,
    run: ReferenceRun,
    *,
    pipe: DiffusionPipeline | None = None,
    video_done: VideoDone | None = None,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Generate with a model what its reference generated, and score every video for `summarise`."""
    model = resolved(model, run.settings, needs_variant=False)
    opened, pipe = pipe, pipe or open_model(model, run.settings, dtype=run.dtype)
    check_comparable(architecture_of(pipe, label=model_label(model)), run.architecture)
    generation = settings_for(pipe, run.generation.to_dict(), defaults={})
    jobs = [(video.prompt, video.seed) for video in run.videos]
    prompts = list(dict.fromkeys(prompt for prompt, _ in jobs))
    check_prompts(pipe, prompts, generation)
    tick = _counter("quantized", len(jobs), run.batch_size, generation, progress)
    replay: Tick | None = None
    scores: list[VideoScores] = []
    for index, (names, seeds) in enumerate(batched(jobs, run.batch_size)):
        result = denoise(pipe, names, seeds=seeds, settings=generation, step_done=tick)
        trajectory = run.recordings[index]
        steps: list[list[float]] = [[] for _ in names]
        if trajectory is not None:
            replay = replay or StageCounter(progress, "velocity", run.recordings.num_calls)
            steps = velocity.velocity_errors(transformers_of(pipe), trajectory, step_done=replay)
        videos = _report_videos(videos_of(names, seeds, result), model, video_done)
        for video, errors in zip(videos, steps, strict=True):
            base, image = run.videos[len(scores)], run.images[video.prompt]
            scores.append(judge_video(video, base, errors, wanted=run.wanted, judges=run.judges, image=image))
    if pipe not in (model, opened):
        del pipe
        free_memory()  # the next model takes its place
    return EvaluationResult(
        model=model_label(model),
        reference=run.architecture.label,
        inputs=tuple(map(prompt_record, prompts)),
        videos=tuple(scores),
        floor=run.floor,
        settings=run.generation,
        dtype=arguments.dtype_name(run.dtype),
        timesteps=run.recordings.timesteps,
    )


def check_request(prompts: Sequence[str], settings: EvaluationSettings) -> tuple[str, ...]:
    """Check what needs no model; return the metrics to compute."""
    lpips, clip = settings.lpips_weights is not None, settings.clip is not None
    wanted = selected_metrics(settings.metrics, lpips=lpips, clip=clip)
    check_distinct(prompts)
    return wanted


def resolved(model: Any, settings: EvaluationSettings, *, needs_variant: bool = True) -> Any:
    """Return a model by name with its files; a loaded pipeline unchanged."""
    if isinstance(model, (str, Path)):
        return resolve_model(model, variant=settings.variant, needs_variant=needs_variant)
    return model


def open_model(model: Any, settings: EvaluationSettings, *, dtype: torch.dtype | str | None) -> Any:
    """Return a model as a loaded pipeline."""
    if not isinstance(model, ModelSource):
        return model
    return load_pipeline(
        model,
        dtype=dtype,
        device=settings.device,
        verify=settings.verify,
        offload=settings.offload,
        sharing=settings.sharing,
    )


def _report_videos(videos: list[Video], model: Any, video_done: VideoDone | None) -> list[Video]:
    if video_done is not None:
        for video in videos:
            video_done(model_label(model), video)
    return videos


def _counter(stage: str, count: int, size: int, settings: GenerationSettings, progress: Progress | None) -> Tick:
    return StageCounter(progress, stage, -(-count // size) * settings.num_inference_steps)
