"""The metrics of one video against the full-precision video of the same prompt and seed, and their names."""

import functools
import itertools
from collections.abc import Sequence

import torch

from s2q.common.errors import InvalidInputError, unknown_name
from s2q.evaluation import metrics
from s2q.evaluation.definitions import metric_table
from s2q.evaluation.judges.adherence import ADHERENCE, adherence
from s2q.evaluation.judges.clip_score import CLIP_METRICS
from s2q.evaluation.judges.learned import LPIPS, Judges, measure_both
from s2q.evaluation.judges.speed import SPEED, speed_ratio
from s2q.evaluation.scores import VideoScores
from s2q.generation.generate import Video
from s2q.shapes.detector import detect_scene

VELOCITY = "velocity_relative_error"
BLACK = "black_frames"
FIRST_FRAME = "first_frame_psnr_db"
METRICS: tuple[str, ...] = (
    *metrics.LATENT_METRICS,
    *metrics.FRAME_METRICS,
    SPEED,
    FIRST_FRAME,
    BLACK,
    *ADHERENCE,
    VELOCITY,
)


def selected_metrics(names: Sequence[str], *, lpips: bool = False, clip: bool = False) -> tuple[str, ...]:
    """Return the metrics to compute: all without `names`, else each name, or all that start with it.

    Those of LPIPS and of CLIP are among them where their weights are given.
    """
    known = (*METRICS, *((LPIPS,) if lpips else ()), *(CLIP_METRICS if clip else ()))
    if not names:
        return known
    chosen: list[str] = []
    for name in names:
        matches = [metric for metric in known if metric == name or metric.startswith(name + "_")]
        needs = metric_table().get(name, {}).get("needs")
        if not matches and needs:
            raise InvalidInputError(f"metric {name}: needs {needs}; s2q neither ships nor downloads its weights")
        if not matches:
            raise unknown_name("metric", name, (*known, "latent", "psnr", "adherence", "velocity"))
        chosen += matches
    return tuple(metric for metric in known if metric in chosen)


def compare_videos(
    video: Video, base: Video, *, names: Sequence[str] = METRICS, image: torch.Tensor | None = None
) -> dict[str, float | None]:
    """Measure a video against the full-precision one of the same prompt and seed; without the velocity error.

    Args:
        image: What the videos start from, uint8 `[H, W, 3]` in the size of the frames; None for text to video.

    Returns:
        Values by metric name; those of the reference alone under `reference_…`; None where a metric does not apply.
    """
    assert (video.prompt, video.seed) == (base.prompt, base.seed)
    values = _distances(video, base, names=names)
    detect = functools.cache(detect_scene)  # once per video: the hash of a tensor is its identity
    if SPEED in names:
        values[SPEED] = speed_ratio(video.prompt, video.frames, base.frames, detect=detect)
    if FIRST_FRAME in names:
        values |= measure_both(lambda _, frames: _first_frame(frames, image), video, base, names=names)
    if BLACK in names:
        values |= measure_both(lambda _, frames: {BLACK: metrics.black_frames(frames)}, video, base, names=names)
    if any(name in ADHERENCE for name in names):
        values |= measure_both(functools.partial(adherence, detect=detect), video, base, names=names)
    return values


def noise_pairs(videos: Sequence[Video], *, judges: Judges, wanted: Sequence[str]) -> list[VideoScores]:
    """Compare each full-precision video with the same prompt's next seed, under which the metrics of the pair are."""
    pairs = []
    for _, group in itertools.groupby(videos, key=lambda video: video.prompt):
        for first, second in itertools.pairwise(group):
            values = _distances(second, first) | judges.distances(second, first, names=wanted)
            pairs.append(VideoScores(prompt=str(second.prompt), seed=second.seed, metrics=values))
    return pairs


def _distances(video: Video, base: Video, *, names: Sequence[str] = METRICS) -> dict[str, float | None]:
    """Distances of latents and frames; the two videos may differ in their seed."""
    latents, frames = metrics.LATENT_METRICS, metrics.FRAME_METRICS
    return {
        **{name: measure(video.latents, base.latents) for name, measure in latents.items() if name in names},
        **{name: measure(video.frames, base.frames) for name, measure in frames.items() if name in names},
    }


def _first_frame(frames: torch.Tensor, image: torch.Tensor | None) -> dict[str, float | None]:
    return {FIRST_FRAME: None if image is None else metrics.first_frame_psnr_db(frames, image)}


def judge_video(
    video: Video,
    base: Video,
    errors: Sequence[float],
    *,
    wanted: Sequence[str],
    judges: Judges,
    image: torch.Tensor | None = None,
) -> VideoScores:
    """Measure everything that is wanted of one video; `errors` are its velocity errors step by step."""
    values = compare_videos(video, base, names=wanted, image=image) | judges.measure(video, base, names=wanted)
    if VELOCITY in wanted:
        values[VELOCITY] = sum(errors) / len(errors) if errors else None
    return VideoScores(prompt=str(video.prompt), seed=video.seed, metrics=values, velocity_steps=tuple(errors))
