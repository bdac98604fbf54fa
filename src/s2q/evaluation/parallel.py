"""Evaluate in several processes: each loads the reference and the model once and measures its share of the prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from s2q.common.progress import Progress
from s2q.engines.processes import ProcessEngine, Tell, devices_of
from s2q.evaluation.scores import EvaluationResult, merge
from s2q.evaluation.settings import EvaluationSettings
from s2q.generation.generate import Video
from s2q.models import ModelSource

MeasuredSet = tuple[EvaluationResult, list[tuple[str, Video]]]


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Prompts of a process; `parts` processes share the disk. Videos are returned with the labels of their models."""

    model: ModelSource
    reference: ModelSource
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: EvaluationSettings
    parts: int = 1
    wants_videos: bool = False


def divide(prompts: Sequence[str], parts: int) -> list[tuple[str, ...]]:
    """Return consecutive shares of the prompts, whose sizes differ by one at most; none is empty."""
    parts = min(parts, len(prompts))
    starts = [index * len(prompts) // parts for index in range(parts + 1)]
    return [tuple(prompts[start:stop]) for start, stop in zip(starts, starts[1:], strict=False)]


def measure_in_processes(
    measure: Callable[[PromptSet, str, Tell], MeasuredSet],
    whole: PromptSet,
    processes: int,
    *,
    video_done: Callable[[str, Video], None] | None,
    progress: Progress | None,
) -> EvaluationResult:
    """Measure a set of prompts in shares, one in each process; return what was measured on all, in their order.

    Args:
        measure: Measures a set of prompts on a device; tells first prompt, stage, finished steps and steps in all.
    """
    shares = divide(whole.prompts, processes)
    wants_videos = video_done is not None
    sets = [replace(whole, prompts=share, parts=len(shares), wants_videos=wants_videos) for share in shares]
    steps: dict[str, dict[str, tuple[int, int]]] = {}

    def report(message: tuple[str, str, int, int]) -> None:
        first_prompt, stage, done, total = message
        steps.setdefault(stage, {})[first_prompt] = done, total
        counts = steps[stage].values()
        waiting = max(total for _, total in counts) * (len(sets) - len(counts))
        if progress is not None:
            progress(stage, sum(done for done, _ in counts), sum(total for _, total in counts) + waiting)

    devices = devices_of(whole.settings.device, len(sets))
    with contextlib.closing(ProcessEngine(devices).map(measure, sets, on_message=report)) as results:
        measured = dict(results)
    ordered = [measured[index] for index in range(len(sets))]
    if video_done is not None:
        for _, videos in ordered:
            for label, video in videos:
                video_done(label, video)
    return merge([result for result, _ in ordered])
