"""The metrics of one video against the full-precision video of the same prompt and seed, and their names."""

from collections.abc import Sequence

from s2q.common.errors import InvalidInputError, unknown_name
from s2q.evaluation import metrics
from s2q.evaluation.judges import adherence
from s2q.evaluation.judges.learned import NEEDS, Judges
from s2q.evaluation.scores import VideoScores
from s2q.generation.generate import Video

VELOCITY = "velocity_relative_error"
METRICS: tuple[str, ...] = (*metrics.LATENT_METRICS, *metrics.FRAME_METRICS, *adherence.DEFINITIONS, VELOCITY)


def selected_metrics(names: Sequence[str], *, learned: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the metrics to compute: all without `names`, else each name, or all that start with it."""
    known = (*METRICS, *learned)
    if not names:
        return known
    chosen: list[str] = []
    for name in names:
        matches = [metric for metric in known if metric == name or metric.startswith(name + "_")]
        if not matches and name in NEEDS:
            raise InvalidInputError(f"metric {name}: needs {NEEDS[name]}; s2q neither ships nor downloads its weights")
        if not matches:
            raise unknown_name("metric", name, (*known, "latent", "psnr", "adherence", "velocity"))
        chosen += matches
    return tuple(metric for metric in known if metric in chosen)


def compare_videos(video: Video, base: Video, *, names: Sequence[str] = METRICS) -> dict[str, float | None]:
    """Measure a video against the full-precision one of the same prompt and seed; without the velocity error.

    Returns:
        Values by metric name; adherence of the reference under `reference_…`; None where a metric does not apply.
    """
    assert (video.prompt, video.seed) == (base.prompt, base.seed)
    values: dict[str, float | None] = {
        name: measure(video.latents, base.latents) for name, measure in metrics.LATENT_METRICS.items() if name in names
    }
    for name, measure in metrics.FRAME_METRICS.items():
        if name in names:
            values[name] = measure(video.frames, base.frames)
    if any(name in adherence.DEFINITIONS for name in names):
        ours, theirs = (adherence.adherence(video.prompt, frames) for frames in (video.frames, base.frames))
        values |= {name: value for name, value in ours.items() if name in names}
        values |= {f"reference_{name}": value for name, value in theirs.items() if name in names}
    return values


def judge_video(
    video: Video, base: Video, errors: Sequence[float], *, wanted: Sequence[str], judges: Judges
) -> VideoScores:
    """Measure everything that is wanted of one video; `errors` are its velocity errors step by step."""
    values = compare_videos(video, base, names=wanted) | judges.measure(video, base, names=wanted)
    if VELOCITY in wanted:
        values[VELOCITY] = sum(errors) / len(errors) if errors else None
    return VideoScores(prompt=video.prompt, seed=video.seed, metrics=values, velocity_steps=tuple(errors))
