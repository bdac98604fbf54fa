"""Judge a model against its full-precision reference: the same prompts, the same noise, video by video.

The reference generates first and its transformer's calls are recorded; it is then released, and the student generates
and answers the recorded calls. Only one of the two models has to fit at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from s2q.common import arguments
from s2q.common.arguments import optional
from s2q.common.components import transformers_of
from s2q.common.errors import InvalidInputError, UsageError, memory_errors
from s2q.common.progress import Progress, StageCounter, silent
from s2q.common.torch_state import in_fresh_torch_state
from s2q.engines.engine import Worker, fixed_threads
from s2q.engines.options import AUTO, Workers, workers_argument
from s2q.evaluation.judges.learned import Judges, open_judges
from s2q.evaluation.measure import VideoDone, check_request, judge_model, open_model, resolved, run_reference
from s2q.evaluation.parallel import MeasuredShard, Room, Shard, measure_shards, shards_of
from s2q.evaluation.recordings import DISK_SHARE
from s2q.evaluation.scores import EvaluationResult
from s2q.evaluation.sensitivity import check_measurable, kind_errors, linears_by_kind
from s2q.evaluation.settings import TRAJECTORY_BYTES, EvaluationSettings
from s2q.evaluation.summary import summarise, summarise_kinds
from s2q.evaluation.video_metrics import VELOCITY
from s2q.generation.defaults import (
    calibrated_generation,
    embedded_source,
    model_label,
)
from s2q.generation.exclusive import exclusive
from s2q.generation.generate import LESS_MEMORY, Video
from s2q.generation.load import (
    check_model,
    check_same_loras,
    models_that_fit,
    refuse_load_options,
)
from s2q.generation.prompts import prompt_list
from s2q.generation.settings import requested_settings
from s2q.models import ModelSource
from s2q.models.architecture import architecture_of, check_comparable, warn_of_scheduler
from s2q.models.lora import with_loras

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@memory_errors("evaluating", remedy=LESS_MEMORY)
@in_fresh_torch_state
def evaluate(
    model: str | Path | ModelSource | DiffusionPipeline,
    *,
    reference: str | Path | ModelSource | DiffusionPipeline,
    prompts: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1),
    metrics: Sequence[str] = (),
    lpips_weights: str | Path | None = None,
    clip: str | Path | None = None,
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
    trajectory_bytes: int = TRAJECTORY_BYTES,
    sensitivity: int = 0,
    workers: int | str = AUTO,
    devices: Sequence[str] | None = None,
    engine: str = "processes",
    ray_address: str | None = None,
    offload: str = AUTO,
    video_done: VideoDone | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare a model with its full-precision reference; options that are not listed are as of `s2q.generate`.

    Args:
        prompts: Distinct prompts; None takes 64 held-out captions, for models made from an embedded one.
        metrics: Names out of `video_metrics.METRICS`, and of learned judges that have weights; empty means all.
        lpips_weights: File of LPIPS's weights; None for no `lpips`.
        clip: Folder of a CLIP model; None for no `clip_score`, `clipsim` and `clip_temp`.
        num_frames: None takes the calibration's setting, then the model's own; also those to `max_sequence_length`.
        variant: Variant of the weights, "fp16"; a judged model that has none of it is loaded without.
        loras: LoRA adapters to fuse into the reference, as `s2q.quantize` fused them into the model.
        trajectory_bytes: Memory of a worker for recorded trajectories; the rest goes to a temporary folder.
        sensitivity: Number of prompts to measure each kind of linears alone on.
        workers: Number of workers that share the prompts, two at a time, or "auto", as for `s2q.quantize`.
        offload: What a GPU that is too small for a model by name has of it; see `s2q.load`.
        video_done: Gets the label of a model and each video when it is generated.

    Returns:
        The content of `eval.json`; see `summarise` and, for `sensitivity`, `summarise_kinds`.

    Raises:
        InvalidInputError: Unknown metric, bad prompts, seeds or settings, a model that was not made from the reference.
        UsageError: An option of loading or several workers with loaded pipelines.
        S2QError: A model produced NaN or infinite values.
    """
    requested = (
        requested_settings(num_frames=num_frames, height=height, width=width, num_inference_steps=num_inference_steps)
        | requested_settings(guidance_scale=guidance_scale, guidance_scale_2=guidance_scale_2)
        | requested_settings(scheduler=scheduler, shift=shift)
        | requested_settings(negative_prompt=negative_prompt, max_sequence_length=max_sequence_length)
    )
    where = workers_argument(workers=workers, devices=devices, device=device, engine=engine, ray_address=ray_address)
    settings = EvaluationSettings(
        metrics=arguments.name_list("metrics", metrics),
        requested=requested,
        batch_size=optional(arguments.whole_number, "batch_size", batch_size, least=1),
        dtype=arguments.parse_dtype(dtype),
        variant=optional(arguments.word, "variant", variant),
        verify=optional(arguments.flag, "verify", verify),
        loras=arguments.path_list("loras", loras),
        lpips_weights=optional(arguments.path_argument, "lpips_weights", lpips_weights),
        clip=optional(arguments.path_argument, "clip", clip),
        trajectory_bytes=arguments.whole_number("trajectory_bytes", trajectory_bytes, least=0),
        device=where.device,
        offload=arguments.offload_name(offload, device=where.device),
        sharing=where.on_one_gpu,
    )
    count = arguments.whole_number("sensitivity", sensitivity, least=0)
    seeds, texts = arguments.seed_numbers(seeds), optional(prompt_list, "prompts", prompts)
    return _evaluate(model, reference, texts, seeds, count, settings, where, video_done=video_done, progress=progress)


def _evaluate(
    model: Any,
    reference: Any,
    texts: list[str] | None,
    seeds: tuple[int, ...],
    sensitivity: int,
    settings: EvaluationSettings,
    where: Workers,
    *,
    video_done: VideoDone | None,
    progress: Progress | None,
) -> dict[str, Any]:
    """Check everything that can be checked before weights are read, then evaluate."""
    model, reference = _resolve_pair(model, reference, settings, where)
    settings = replace(settings, recommended=calibrated_generation(model) or {})
    texts = default_prompts(reference) if texts is None else texts
    check_request(texts, settings)
    if sensitivity:
        check_measurable(model, reference)
    if isinstance(model, ModelSource) and isinstance(reference, ModelSource):
        measured = _evaluate_shards(
            model, reference, texts, seeds, settings, where, video_done=video_done, progress=progress or silent
        )
    else:
        run = run_reference(
            reference, prompts=texts, seeds=seeds, settings=settings, video_done=video_done, progress=progress
        )
        measured = judge_model(model, run, video_done=video_done, progress=progress)
    result = summarise(measured)
    if sensitivity:
        with fixed_threads(where.device):
            result["sensitivity"] = _measure_sensitivity(
                model, reference, texts[:sensitivity], seed=seeds[0], settings=settings, progress=progress
            )
    return result


@memory_errors("measuring the sensitivity", remedy=LESS_MEMORY)
@in_fresh_torch_state
def _measure_sensitivity(
    model: Any,
    reference: Any,
    prompts: Sequence[str],
    *,
    seed: int,
    settings: EvaluationSettings,
    progress: Progress | None,
) -> dict[str, Any] | None:
    """Measure the velocity error of each kind of linears alone; see `summarise_kinds`."""
    settings = replace(settings, metrics=(VELOCITY,))
    pipe = open_model(reference, settings, dtype=settings.dtype)
    run = run_reference(
        reference, pipe=pipe, judges=Judges(), prompts=prompts, seeds=(seed,), settings=settings, progress=progress
    )
    student = open_model(model, replace(settings, device="cpu", offload=AUTO), dtype=run.dtype)
    kinds = linears_by_kind(transformers_of(student))
    tick = StageCounter(progress, "sensitivity", len(kinds) * run.recordings.num_calls)
    recorded: list[str] = []
    errors: list[dict[str, float]] = []
    with exclusive(pipe):
        for trajectory in run.recordings.recorded():
            recorded += trajectory.prompts
            errors += kind_errors(transformers_of(pipe), kinds, trajectory, step_done=tick)
    return summarise_kinds({kind: len(linears) for kind, linears in kinds.items()}, recorded, errors)


def _evaluate_shards(
    model: ModelSource,
    reference: ModelSource,
    prompts: Sequence[str],
    seeds: tuple[int, ...],
    settings: EvaluationSettings,
    where: Workers,
    *,
    video_done: VideoDone | None,
    progress: Progress,
) -> EvaluationResult:
    """Evaluate models by name, in as many workers as the memory has room for unless the user has said how many."""
    open_judges(lpips_weights=settings.lpips_weights, clip=settings.clip, device="cpu")  # refuses what is none
    shards, most = shards_of(prompts), models_that_fit((model, reference), where.device)
    count = where.planned(len(shards), most=max(1, most) if where.is_cpu and most is not None else None)
    work = _ShardWork(
        model=model,
        reference=reference,
        seeds=seeds,
        settings=settings,
        workers=count,
        room=Room.of((model, reference), where, count),
        wants_videos=video_done is not None,
    )
    with fixed_threads(where.device), closing(where.open(count, modules=(__name__,))) as engine:
        return measure_shards(engine, work, shards, video_done=video_done, progress=progress)


def _resolve_pair(model: Any, reference: Any, settings: EvaluationSettings, workers: Workers) -> tuple[Any, Any]:
    """Return a model and its reference, resolved where they were given by name, if they can be compared."""
    model, reference = arguments.model_argument("model", model), arguments.model_argument("reference", reference)
    reference, model = resolved(reference, settings), resolved(model, settings, needs_variant=False)
    if isinstance(reference, ModelSource):
        reference = with_loras(reference, settings.loras)
    elif settings.loras:
        raise UsageError("evaluate: loras are for a reference by name or folder; fuse them by fuse_lora()")
    sources = [side for side in (reference, model) if isinstance(side, ModelSource)]
    for source in sources:
        check_model(source, verify=settings.verify)
    if len(sources) < 2:
        workers.check_alone("evaluate")
    if not sources:
        refuse_load_options("evaluate", dtype=settings.dtype, variant=settings.variant)
        refuse_load_options("evaluate", verify=settings.verify, offload=settings.offload)
    ours, theirs = (architecture_of(side, label=model_label(side)) for side in (model, reference))
    check_comparable(ours, theirs)
    if len(sources) == 2:
        check_same_loras(model, reference)
    warn_of_scheduler(ours, theirs)
    return model, reference


@dataclass(frozen=True, kw_only=True)
class _ShardWork:
    """Measures shards of prompts.

    Attributes:
        workers: Number of workers that share the disk.
        room: For both models to stay from shard to shard; without it, only one is loaded at a time.
        wants_videos: Whether videos are returned, with the labels of their models.
    """

    model: ModelSource
    reference: ModelSource
    seeds: tuple[int, ...]
    settings: EvaluationSettings
    workers: int
    room: Room
    wants_videos: bool

    def __call__(self, prompts: Shard, worker: Worker) -> MeasuredShard:
        """Measure prompts; see `measure_shards`."""
        videos: list[tuple[str, Video]] = []
        video_done = (lambda label, video: videos.append((label, video))) if self.wants_videos else None
        settings = replace(self.settings, device=worker.device)

        def progress(stage: str, done: int, total: int) -> None:
            worker.tell((prompts[0], stage, done, total))

        record = partial(
            run_reference,
            self.reference,
            judges=worker.keep("judges", settings.open_judges),
            prompts=prompts,
            seeds=self.seeds,
            settings=settings,
            disk_share=DISK_SHARE / self.workers,
            video_done=video_done,
            progress=progress,
        )
        load = partial(open_model, self.reference, settings, dtype=settings.dtype)
        run = self.room.use(worker, "reference", load, record)
        judge = partial(judge_model, self.model, run, video_done=video_done, progress=progress)
        return self.room.use(worker, "model", partial(open_model, self.model, settings, dtype=run.dtype), judge), videos


def default_prompts(reference: Any, *, count: int = 64) -> list[str]:
    """Return held-out captions for an embedded model."""
    from s2q.shapes.embedded import embedded_prompts

    source = embedded_source(reference)
    if source is None:
        raise InvalidInputError(
            f"{model_label(reference)}: no prompts given, and only embedded models have prompts; pass --prompts "
            "FILE (prompts=[...] in Python)"
        )
    return embedded_prompts(source, split="held-out", count=count)
