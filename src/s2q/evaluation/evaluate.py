"""Judging a model against its full-precision reference: the same prompts, the same noise, video by video.

The reference generates first and its transformer's calls are recorded; it is then released, and the student generates
and answers the recorded calls. Only one of the two models has to fit at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from s2q.common.arguments import (
    device_name,
    dtype_name,
    flag,
    model_argument,
    name_list,
    optional_path,
    optional_text,
    parse_dtype,
    prompt_list,
    seed_numbers,
    whole_number,
)
from s2q.common.components import transformers_of
from s2q.common.devices import free_memory
from s2q.common.errors import InvalidInputError, UsageError, memory_errors
from s2q.common.progress import Progress, StageCounter, Tick
from s2q.common.torch_state import in_fresh_torch_state
from s2q.engines.processes import Tell
from s2q.evaluation import velocity
from s2q.evaluation.judges.learned import Judges, learned_names, open_judges
from s2q.evaluation.parallel import MeasuredSet, PromptSet, measure_in_processes
from s2q.evaluation.recordings import Recordings
from s2q.evaluation.scores import EvaluationResult, VideoScores
from s2q.evaluation.summary import noise_pairs, summarise
from s2q.evaluation.video_metrics import VELOCITY, judge_video, selected_metrics
from s2q.generation.defaults import embedded_source, generation_defaults, model_label
from s2q.generation.denoise import denoise
from s2q.generation.generate import (
    LESS_MEMORY,
    Video,
    batch_size_for,
    batched,
    settings_for,
    videos_of,
)
from s2q.generation.load import check_model, load_pipeline
from s2q.generation.prompts import check_distinct
from s2q.generation.settings import GenerationSettings, check_prompts, requested_settings
from s2q.generation.trajectory import record_trajectory
from s2q.models import ModelSource, resolve_model
from s2q.models.architecture import Architecture, architecture_of, check_comparable, warn_of_scheduler

_TRAJECTORY_BYTES = 4 * 2**30
_Jobs = tuple[tuple[str, int], ...]


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Settings of an evaluation.

    Attributes:
        metrics: Names out of `video_metrics.METRICS`, and of learned judges that have weights; empty means all.
        settings: Generation settings that differ from the model's own, by field name of `GenerationSettings`.
        batch_size: Videos per batch; None chooses by the number of video tokens.
        dtype: Compute dtype of models given by name; None is the reference's, for both: the stored one, or float32
            where the device emulates that.
        variant: Variant of the weights of models given by name, "fp16"; the reference must have it, and a judged model
            that has it is loaded in it too.
        verify: What is verified of s2q checkpoints given by name; see `s2q.generation.load.load_pipeline`.
        device: Device of models given by name.
        trajectory_bytes: Memory of a process for recorded trajectories; what is beyond it goes to a temporary folder.
        lpips_weights: File of LPIPS's weights; None for no `lpips`.
        clip: Folder of a CLIP model; None for no `clip_score`, `clipsim` and `clip_temp`.
        processes: Processes that share the prompts; several need models given by name.
        video_done: Called with each video as it is generated and the label of its model (`model_label`), to keep it.
    """

    metrics: tuple[str, ...] = ()
    settings: Mapping[str, Any] | None = None
    batch_size: int | None = None
    dtype: torch.dtype | str | None = None
    variant: str | None = None
    verify: bool | None = None
    device: str | torch.device | int = "cpu"
    trajectory_bytes: int = _TRAJECTORY_BYTES
    lpips_weights: Path | None = None
    clip: Path | None = None
    processes: int = 1
    video_done: Callable[[str, Video], None] | None = None

    def __post_init__(self) -> None:
        dtype, batch_size = parse_dtype(self.dtype), self.batch_size
        normalised = {
            "metrics": name_list("metrics", self.metrics),
            "settings": requested_settings(self.settings),
            "batch_size": None if batch_size is None else whole_number("batch_size", batch_size, least=1),
            "dtype": None if dtype is None else dtype_name(dtype),
            "variant": optional_text("variant", self.variant),
            "verify": None if self.verify is None else flag("verify", self.verify),
            "device": device_name(self.device),
            "trajectory_bytes": whole_number("trajectory_bytes", self.trajectory_bytes, least=0),
            "lpips_weights": optional_path("lpips_weights", self.lpips_weights),
            "clip": optional_path("clip", self.clip),
            "processes": whole_number("processes", self.processes, least=1),
        }
        for name, value in normalised.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The reference's side, with which any number of models is compared; see `run_reference`.

    Attributes:
        architecture: That of the reference, which models are checked against.
        jobs: Prompt and seed of every video.
        wanted: Metrics to compute.
        settings: The generation settings.
        dtype: Compute dtype.
        batch_size: Videos per batch.
        videos: The videos in the order of the jobs.
        recordings: What the transformers saw and answered, batch by batch; None without velocity error.
        timesteps: Timestep of every recorded step.
        judges: Learned judges, for metrics among `wanted`.
        floor: See `EvaluationResult`.
    """

    architecture: Architecture
    jobs: tuple[tuple[str, int], ...]
    wanted: tuple[str, ...]
    settings: GenerationSettings
    dtype: torch.dtype
    batch_size: int
    videos: tuple[Video, ...]
    recordings: Recordings | None
    timesteps: tuple[float, ...]
    judges: Judges
    floor: tuple[VideoScores, ...]


@memory_errors("evaluating", remedy=LESS_MEMORY)
@in_fresh_torch_state
def evaluate(
    model: Any,
    reference: Any,
    *,
    prompts: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1),
    options: EvaluationOptions | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare a model with its full-precision reference.

    Args:
        model: The student: a pipeline, the name or folder of one, or a resolved source.
        reference: The teacher: the same.
        prompts: Distinct prompts; by default 64 held-out captions, for models made from an embedded one.
        seeds: Every prompt is generated with every seed.
        options: Metrics, settings, dtype, device.
        progress: Called after every denoising step with the stage, the steps done and the steps in all.

    Returns:
        The content of `eval.json`: `schema_version`, `model`, `reference`, `n_prompts`, `n_seeds`, `metrics`, `videos`,
        `velocity` (by step), `noise_floor` (full precision with another seed), `settings` and `versions`; with a CLIP
        model also `evalcrafter`.

    Raises:
        InvalidInputError: Unknown metric, bad prompts or seeds, settings that a model cannot take, or a model that was
            not made from the reference; before anything is generated.
        S2QError: A model produced NaN or infinite values.
    """
    options = options or EvaluationOptions()
    model, reference = model_argument("model", model), model_argument("reference", reference)
    seeds, prompts = seed_numbers(seeds), None if prompts is None else prompt_list(prompts)
    model, reference = _resolve_pair(model, reference, options=options)
    if options.processes > 1:
        if not isinstance(model, ModelSource) or not isinstance(reference, ModelSource):
            raise UsageError(
                f"evaluate: got processes={options.processes} and a loaded pipeline; pass the names or folders of the "
                "models, which every process loads"
            )
        texts = default_prompts(reference) if prompts is None else prompts
        _check_request(texts, options)
        return summarise(
            measure_in_processes(
                _measure_set, model, reference, prompts=texts, seeds=seeds, options=options, progress=progress
            )
        )
    return next(evaluate_each([model], reference, prompts=prompts, seeds=seeds, options=options, progress=progress))


def _resolve_pair(model: Any, reference: Any, *, options: EvaluationOptions) -> tuple[Any, Any]:
    """Find a model and its reference, and check before any compute that they can be compared.

    Args:
        model: The student, as `evaluate` takes it.
        reference: The teacher.
        options: Their variant, and what is verified.

    Returns:
        Both, resolved where they were given by name.

    Raises:
        InvalidInputError: If one is unknown or damaged, or the model was not made from the reference.
        ResourceError: If a package that a component needs is not installed.
    """
    reference, model = _resolved(reference, options), _resolved(model, options, needs_variant=False)
    for one in (reference, model):
        if isinstance(one, ModelSource):
            check_model(one, verify=options.verify)
    ours, theirs = (architecture_of(one, label=model_label(one)) for one in (model, reference))
    check_comparable(ours, theirs)
    warn_of_scheduler(ours, theirs)
    return model, reference


def evaluate_each(
    models: Iterable[Any],
    reference: Any,
    *,
    prompts: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1),
    options: EvaluationOptions | None = None,
    progress: Progress | None = None,
) -> Iterator[dict[str, Any]]:
    """Compare several models with one reference, which generates only once; see `evaluate`.

    Args:
        models: The students; each is taken when the one before it has been judged.
        reference: The teacher.
        prompts: See `evaluate`.
        seeds: See `evaluate`.
        options: See `evaluate`.
        progress: See `evaluate`.

    Yields:
        What `evaluate` returns, for each model.

    Raises:
        InvalidInputError: See `evaluate`.
        S2QError: See `evaluate`.
    """
    options = options or EvaluationOptions()
    teacher = run_reference(reference, prompts=prompts, seeds=seeds, options=options, progress=progress)
    for model in models:
        yield summarise(judge_model(model, teacher, options=options, progress=progress))


@memory_errors("evaluating the reference", remedy=LESS_MEMORY)
@in_fresh_torch_state
def run_reference(
    reference: Any,
    *,
    prompts: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1),
    options: EvaluationOptions | None = None,
    progress: Progress | None = None,
) -> Teacher:
    """Generate the full-precision videos and record the calls of the transformer; see `evaluate`.

    Args:
        reference: The teacher.
        prompts: See `evaluate`.
        seeds: See `evaluate`.
        options: See `evaluate`.
        progress: See `evaluate`.

    Returns:
        What `judge_model` compares models with.

    Raises:
        InvalidInputError: See `evaluate`.
        S2QError: See `evaluate`.
    """
    options = options or EvaluationOptions()
    reference, seeds = model_argument("reference", reference), seed_numbers(seeds)
    prompts = default_prompts(reference) if prompts is None else prompt_list(prompts)
    _check_request(prompts, options)
    judges = open_judges(lpips_weights=options.lpips_weights, clip=options.clip, device=options.device)
    wanted = selected_metrics(options.metrics, learned=judges.names)
    jobs = tuple((prompt, seed) for prompt in prompts for seed in seeds)
    return _run_teacher(reference, jobs, options, wanted=wanted, judges=judges, progress=progress)


@memory_errors("evaluating a model", remedy=LESS_MEMORY)
@in_fresh_torch_state
def judge_model(
    model: Any, teacher: Teacher, *, options: EvaluationOptions | None = None, progress: Progress | None = None
) -> EvaluationResult:
    """Generate with a model what its reference generated, and measure every video.

    Args:
        model: The student: a pipeline, the name or folder of one, or a resolved source.
        teacher: What `run_reference` returned.
        options: Those that the reference ran with.
        progress: See `evaluate`.

    Returns:
        Measurements, which `summarise` turns into the content of `eval.json`.

    Raises:
        InvalidInputError: The settings do not fit the model, or it was not made from the reference.
        S2QError: The model produced NaN or infinite values.
    """
    return EvaluationResult(
        model=model_label(model),
        reference=teacher.architecture.label,
        videos=tuple(_run_student(model, options or EvaluationOptions(), teacher, progress)),
        floor=teacher.floor,
        settings=teacher.settings,
        dtype=dtype_name(teacher.dtype),
        timesteps=teacher.timesteps,
    )


def _check_request(prompts: Sequence[str], options: EvaluationOptions) -> None:
    """Check what needs no model."""
    learned = learned_names(lpips=options.lpips_weights is not None, clip=options.clip is not None)
    selected_metrics(options.metrics, learned=learned)
    check_distinct(prompts)


def _measure_set(part: PromptSet, device: str, tell: Tell) -> MeasuredSet:
    """Measure some of the prompts, in a process of several."""
    videos: list[tuple[str, Video]] = []

    def keep(label: str, video: Video) -> None:
        videos.append((label, video))

    def progress(stage: str, done: int, total: int) -> None:
        tell((part.prompts[0], stage, done, total))

    options = replace(part.options, device=device, video_done=keep if part.wants_videos else None)
    teacher = run_reference(part.reference, prompts=part.prompts, seeds=part.seeds, options=options, progress=progress)
    return judge_model(part.model, teacher, options=options, progress=progress), videos


def default_prompts(reference: Any, *, count: int = 64) -> list[str]:
    """Return held-out captions for an embedded model.

    Args:
        reference: The full-precision model, by name, or a pipeline.
        count: How many.

    Raises:
        InvalidInputError: The model is not an embedded one, so that there are no captions to fall back on.
    """
    from s2q.shapes.embedded import embedded_prompts

    source = embedded_source(reference)
    if source is None:
        raise InvalidInputError(
            f"{model_label(reference)}: no prompts given, and only embedded models have prompts; pass --prompts "
            "FILE (prompts=[...] in Python)"
        )
    return embedded_prompts(source, split="held-out", count=count)


def _resolved(model: Any, options: EvaluationOptions, *, needs_variant: bool = True) -> Any:
    if isinstance(model, (str, Path)):
        return resolve_model(model, variant=options.variant, needs_variant=needs_variant)
    return model


def _open(model: Any, options: EvaluationOptions, *, dtype: torch.dtype | str | None) -> Any:
    if not isinstance(model, ModelSource):
        return model
    return load_pipeline(model, dtype=dtype, device=options.device, verify=options.verify)


def _run_teacher(
    reference: Any,
    jobs: _Jobs,
    options: EvaluationOptions,
    *,
    wanted: tuple[str, ...],
    judges: Judges,
    progress: Progress | None,
) -> Teacher:
    reference = _resolved(reference, options)
    pipe = _open(reference, options, dtype=options.dtype)
    architecture = architecture_of(pipe, label=model_label(reference))
    dtype = pipe.transformer.dtype
    settings = settings_for(pipe, options.settings, defaults=generation_defaults(reference))
    check_prompts(pipe, list(dict.fromkeys(prompt for prompt, _ in jobs)))
    size = batch_size_for(pipe, settings, options.batch_size)
    tick = _counter("full precision", jobs, size, settings, progress)
    videos: list[Video] = []
    recordings = Recordings(memory_bytes=options.trajectory_bytes)
    timesteps: tuple[float, ...] = ()
    for names, seeds in _batches(jobs, size):
        if VELOCITY in wanted and recordings.has_room():
            result: Any = record_trajectory(pipe, names, seeds=seeds, settings=settings, decode=True, step_done=tick)
            timesteps = tuple(call.timestep for call in result.calls)
            recordings.add(result)
        else:
            result = denoise(pipe, names, seeds=seeds, settings=settings, step_done=tick)
            if VELOCITY in wanted:
                recordings.skip()
        videos += _handed_on(videos_of(names, seeds, result), reference, options)
    if pipe is not reference:
        del pipe
        free_memory()
    return Teacher(
        architecture=architecture,
        jobs=jobs,
        wanted=wanted,
        settings=settings,
        dtype=dtype,
        batch_size=size,
        videos=tuple(videos),
        recordings=recordings if VELOCITY in wanted else None,
        timesteps=timesteps,
        judges=judges,
        floor=tuple(noise_pairs(videos, learned=judges.frame_metrics(wanted))),
    )


def _run_student(
    model: Any, options: EvaluationOptions, teacher: Teacher, progress: Progress | None
) -> list[VideoScores]:
    jobs = teacher.jobs
    model = _resolved(model, options, needs_variant=False)
    pipe = _open(model, options, dtype=teacher.dtype)
    check_comparable(architecture_of(pipe, label=model_label(model)), teacher.architecture)
    settings = settings_for(pipe, teacher.settings, defaults={})
    check_prompts(pipe, list(dict.fromkeys(prompt for prompt, _ in jobs)))
    size = teacher.batch_size
    tick = _counter("quantized", jobs, size, settings, progress)
    recordings = teacher.recordings
    replays = 0 if recordings is None else recordings.num_calls
    replay: Tick | None = None
    judged: list[VideoScores] = []
    for index, (names, seeds) in enumerate(_batches(jobs, size)):
        result = denoise(pipe, names, seeds=seeds, settings=settings, step_done=tick)
        trajectory = None if recordings is None else recordings[index]
        steps: list[list[float]] = [[] for _ in names]
        if trajectory is not None:
            replay = replay or StageCounter(progress, "velocity", replays)
            steps = velocity.velocity_errors(transformers_of(pipe), trajectory, step_done=replay)
        for video, errors in zip(_handed_on(videos_of(names, seeds, result), model, options), steps, strict=True):
            judged.append(
                judge_video(video, teacher.videos[len(judged)], errors, wanted=teacher.wanted, judges=teacher.judges)
            )
    if pipe is not model:
        del pipe
        free_memory()  # the next model takes its place
    return judged


def _handed_on(videos: list[Video], model: Any, options: EvaluationOptions) -> list[Video]:
    for video in videos if options.video_done else ():
        options.video_done(model_label(model), video)
    return videos


def _counter(
    stage: str, jobs: Sequence[Any], size: int, settings: GenerationSettings, progress: Progress | None
) -> Tick:
    return StageCounter(progress, stage, -(-len(jobs) // size) * settings.num_inference_steps)


def _batches(jobs: _Jobs, size: int) -> Iterator[tuple[list[str], list[int]]]:
    for batch in batched(jobs, size):
        yield [prompt for prompt, _ in batch], [seed for _, seed in batch]
