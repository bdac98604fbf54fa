"""Generating videos for evaluation and for the command line, in batches whose members do not know each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from s2q.common.arguments import model_argument, offload_name, optional, path_list, seed_numbers, whole_number, word
from s2q.common.errors import memory_errors
from s2q.common.progress import Progress, StageCounter
from s2q.common.torch_state import in_fresh_torch_state
from s2q.engines.engine import Engine, InProcessEngine, Worker, fixed_threads
from s2q.engines.options import AUTO, Workers, workers_argument
from s2q.generation.conditioning import check_supported, takes_batches
from s2q.generation.defaults import generation_defaults, with_first_frames
from s2q.generation.denoise import DenoisingResult, denoise
from s2q.generation.load import load_pipeline, pipeline_to_ask, refuse_load_options
from s2q.generation.prompts import Prompt, prompt_list, prompt_record
from s2q.generation.settings import (
    GenerationSettings,
    check_prompts,
    requested_settings,
    resolve_settings,
    video_tokens,
)
from s2q.generation.trajectory import Trajectory
from s2q.models import ModelSource, resolve_model
from s2q.models.lora import with_loras

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_BATCH_TOKENS = 4096
_MAX_BATCH = 16
LESS_MEMORY = (
    "use smaller or shorter videos (height, width, num_frames), fewer at once (batch_size), dtype bfloat16, or offload "
    "more (--offload group; enable_group_offload of a loaded pipeline)"
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
    guidance_scale_2: float | None = None,
    scheduler: str | None = None,
    shift: float | None = None,
    negative_prompt: str | None = None,
    max_sequence_length: int | None = None,
    batch_size: int | None = None,
    device: str | torch.device | int = "cpu",
    dtype: torch.dtype | str | None = None,
    variant: str | None = None,
    loras: Sequence[str | Path] = (),
    verify: bool | None = None,
    backend: str = "auto",
    attention_backend: str | None = None,
    workers: int | str = AUTO,
    devices: Sequence[str] | None = None,
    engine: str = "processes",
    ray_address: str | None = None,
    offload: str = AUTO,
    progress: Progress | None = None,
) -> list[Video]:
    """Generate one video for every prompt and seed.

    A video depends on its prompt, its seed, the settings and the model; the batch it is computed in changes it by
    floating-point rounding only. Threads may call it with one pipeline: they take turns.

    Args:
        model: A pipeline, the name or folder of one, or a resolved source. `device`, `dtype`, `variant`, `loras`,
            `verify` and the backends are for models that are loaded here; see `s2q.load`.
        prompts: Texts, or mappings with `prompt` and some of `image`, `negative_prompt` and `seed`.
        seeds: Every prompt is generated with every seed; one that has a seed of its own, with that alone.
        num_frames: None takes the model's own, as for all settings down to `max_sequence_length`, which
            `GenerationSettings` documents; a calibrated checkpoint's are those that its recipe sets.
        loras: LoRA adapters to fuse into a full-precision model, "[transformer_2=]FILE.safetensors[:SCALE]".
        batch_size: Videos per batch; by default as many as hold 4,096 video tokens together, 1 to 16.
        workers: Number of workers, which load the model each and take batches in turn, in one thread on a CPU; "auto"
            takes every visible GPU, or this process with all its threads.
        devices: Devices that workers take in turn, such as ["cuda:0", "cuda:2"]; replaces `device`.
        engine: "processes" of this machine, or "ray".
        ray_address: Address of a Ray cluster, "HOST:PORT" or "auto"; None takes `RAY_ADDRESS`, or starts Ray here.
        offload: What a GPU that is too small for a model by name has of it; see `s2q.load`.

    Returns:
        The videos, prompt by prompt, each prompt's in the order of the seeds.

    Raises:
        InvalidInputError: A prompt, an image, a seed, a size or another setting does not fit the model, or its
            pipeline needs more than prompts and images.
        S2QError: The model produced NaN or infinite latents.
    """
    model, requests, seeds = model_argument("model", model), prompt_list("prompts", prompts), seed_numbers(seeds)
    requested = (
        requested_settings(num_frames=num_frames, height=height, width=width, num_inference_steps=num_inference_steps)
        | requested_settings(guidance_scale=guidance_scale, guidance_scale_2=guidance_scale_2)
        | requested_settings(scheduler=scheduler, shift=shift)
        | requested_settings(negative_prompt=negative_prompt, max_sequence_length=max_sequence_length)
    )
    batch_size = optional(whole_number, "batch_size", batch_size, least=1)
    where = workers_argument(workers=workers, devices=devices, device=device, engine=engine, ray_address=ray_address)
    work = _BatchWork(
        dtype=dtype,
        verify=verify,
        backend=backend,
        attention_backend=attention_backend,
        offload=offload_name(offload, device=where.device),
        sharing=where.on_one_gpu,
    )
    if isinstance(model, str | Path | ModelSource):
        source = resolve_model(model, variant=optional(word, "variant", variant))
        source = with_loras(source, path_list("loras", loras))
        return _generate_named(work, source, requests, seeds, requested, batch_size, where, progress)
    refuse_load_options("generate", dtype=dtype, variant=variant, verify=verify, loras=loras, offload=offload)
    refuse_load_options("generate", backend=backend, attention_backend=attention_backend)
    where.check_alone("generate")
    return _generate_loaded(work, model, requests, seeds, requested, batch_size, where, progress)


def _generate_loaded(
    work: _BatchWork,
    pipe: DiffusionPipeline,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    requested: Mapping[str, Any],
    batch_size: int | None,
    where: Workers,
    progress: Progress | None,
) -> list[Video]:
    """Generate with a loaded pipeline, in this process."""
    resolved = settings_for(pipe, requested, defaults=generation_defaults(pipe))
    batches = _batches(pipe, with_first_frames(pipe, prompts), seeds, resolved, batch_size)
    engine = InProcessEngine(where.device)
    engine.offer(_PIPE, pipe)
    return _generate(engine, replace(work, settings=resolved), batches, progress)


def _generate_named(
    work: _BatchWork,
    source: ModelSource,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    requested: Mapping[str, Any],
    batch_size: int | None,
    where: Workers,
    progress: Progress | None,
) -> list[Video]:
    """Generate with a model by name; its batches are the same for any number of workers."""
    most = 1 if where.is_cpu else None
    wanted = where.count or where.planned(len(_jobs(prompts, seeds)), most=most)
    alone = where.engine == "processes" and wanted == 1
    pipe = work.load(source, where.device) if alone else pipeline_to_ask(source)
    resolved = settings_for(pipe, requested, defaults=generation_defaults(source))
    batches = _batches(pipe, with_first_frames(source, prompts), seeds, resolved, batch_size)
    count = 1 if alone else where.planned(len(batches), most=most)
    threads = nullcontext() if where.count is None else fixed_threads(where.device)
    with threads, closing(where.open(count, modules=(__name__,))) as engine:
        if alone:
            engine.offer(_PIPE, pipe)
        return _generate(engine, replace(work, source=source, settings=resolved), batches, progress)


_PIPE = "pipe"
_Batch = tuple[list[str], list[int]]


@dataclass(frozen=True, kw_only=True)
class _BatchWork:
    """Generates batches of videos; a worker loads the pipeline once. `settings` are None until they are resolved."""

    source: ModelSource | None = None
    settings: GenerationSettings | None = None
    dtype: torch.dtype | str | None
    verify: bool | None
    backend: str
    attention_backend: str | None
    offload: str
    sharing: int

    def __call__(self, batch: _Batch, worker: Worker) -> list[Video]:
        """Generate a batch, its prompts and seeds; tells None after each step."""
        assert self.settings is not None
        pipe = worker.keep(_PIPE, lambda: self.load(self.source, worker.device))
        result = denoise(pipe, batch[0], seeds=batch[1], settings=self.settings, step_done=lambda: worker.tell(None))
        return videos_of(*batch, result)

    def load(self, source: ModelSource | None, device: str) -> DiffusionPipeline:
        """Load the pipeline."""
        assert source is not None, "a loaded pipeline is offered to the engine"
        return load_pipeline(
            source,
            dtype=self.dtype,
            device=device,
            verify=self.verify,
            backend=self.backend,
            attention_backend=self.attention_backend,
            offload=self.offload,
            sharing=self.sharing,
        )


def _jobs(prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[tuple[str, int]]:
    """Return prompt and seed of every video: each prompt with each seed, or with its own alone."""
    return [(prompt, seed) for prompt in prompts for seed in (seeds if prompt.seed is None else [prompt.seed])]


def _batches(
    pipe: Any, prompts: Sequence[Prompt], seeds: Sequence[int], settings: GenerationSettings, batch_size: int | None
) -> list[_Batch]:
    check_prompts(pipe, prompts, settings)
    return list(batched(_jobs(prompts, seeds), batch_size_for(pipe, settings, asked=batch_size)))


def _generate(engine: Engine, work: _BatchWork, batches: Sequence[_Batch], progress: Progress | None) -> list[Video]:
    assert work.settings is not None
    tick = StageCounter(progress, "generate", len(batches) * work.settings.num_inference_steps)
    with closing(engine.map(work, batches, on_message=lambda _: tick())) as results:
        videos = dict(results)
    return [video for index in range(len(batches)) for video in videos[index]]


def videos_of(prompts: Sequence[str], seeds: Sequence[int], result: DenoisingResult | Trajectory) -> list[Video]:
    """Return the videos of one decoded batch, one for each prompt and seed."""
    assert result.frames is not None
    return [
        Video(prompt=prompt, seed=seed, frames=frames, latents=latents)
        for prompt, seed, frames, latents in zip(prompts, seeds, result.frames, result.latents, strict=True)
    ]


def described(video: Video) -> dict[str, Any]:
    """Return what a video was made from as plain data: the prompt with all that belongs to it, and the seed."""
    record = prompt_record(video.prompt)
    return {**(record if isinstance(record, dict) else {"prompt": record}), "seed": video.seed}


def settings_for(pipe: Any, requested: Mapping[str, Any], *, defaults: Mapping[str, Any]) -> GenerationSettings:
    """Return checked settings from what was asked for and what the model's makers recommend."""
    check_supported(pipe)
    return resolve_settings(pipe, requested=requested, defaults=defaults)


def batch_size_for(pipe: Any, settings: GenerationSettings, *, asked: int | None = None) -> int:
    """Return how many videos to compute at once: what was asked for, or as many as hold 4,096 video tokens, 1 to 16.

    It is 1 where the pipeline takes one prompt.
    """
    if not takes_batches(pipe):
        return 1
    return asked or max(1, min(_MAX_BATCH, _BATCH_TOKENS // video_tokens(pipe, settings)))


def batched(jobs: Sequence[tuple[str, int]], size: int) -> Iterator[tuple[list[str], list[int]]]:
    """Yield the prompts and the seeds of at most `size` jobs after another."""
    for start in range(0, len(jobs), size):
        batch = jobs[start : start + size]
        yield [prompt for prompt, _ in batch], [seed for _, seed in batch]
