"""Evaluating with several processes, which claim one set of prompts after another."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from s2q.common.progress import Progress
from s2q.engines.processes import ProcessEngine, Tell, devices_of
from s2q.evaluation.scores import EvaluationResult, merge
from s2q.generation.generate import Video
from s2q.models import ModelSource

if TYPE_CHECKING:
    from s2q.evaluation.evaluate import EvaluationOptions

PROMPTS = 8
"""Prompts that a process claims at a time, at most."""


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """The prompts that a process evaluates at a time.

    Attributes:
        model: The student.
        reference: The teacher.
        prompts: The prompts.
        seeds: Every prompt is generated with every seed.
        options: `EvaluationOptions`, without `video_done`.
        wants_videos: Whether the videos are returned, with the labels of their models.
    """

    model: ModelSource
    reference: ModelSource
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    options: EvaluationOptions
    wants_videos: bool


MeasuredSet = tuple[EvaluationResult, list[tuple[str, Video]]]


def measure_in_processes(
    measure: Callable[[PromptSet, str, Tell], MeasuredSet],
    model: ModelSource,
    reference: ModelSource,
    *,
    prompts: Sequence[str],
    seeds: Sequence[int],
    options: EvaluationOptions,
    progress: Progress | None,
) -> EvaluationResult:
    """Measure a model beside its full-precision reference; every process loads both.

    Args:
        measure: Measures a set of prompts on a device; tells stage, finished steps and steps in all.
        model: The student.
        reference: The teacher.
        prompts: Distinct prompts.
        seeds: Every prompt is generated with every seed.
        options: `EvaluationOptions`; `processes` is how many take part.
        progress: See `evaluate`.

    Returns:
        What was measured on all prompts, in their order.

    Raises:
        S2QError: A process died, or a model produced NaN or infinite values.
    """
    size = min(PROMPTS, -(-len(prompts) // options.processes))
    common = functools.partial(
        PromptSet,
        model=model,
        reference=reference,
        seeds=tuple(seeds),
        options=replace(options, video_done=None),
        wants_videos=options.video_done is not None,
    )
    sets = [common(prompts=tuple(prompts[start : start + size])) for start in range(0, len(prompts), size)]
    steps: dict[str, dict[str, tuple[int, int]]] = {}

    def report(message: tuple[str, str, int, int]) -> None:
        first_prompt, stage, done, total = message
        steps.setdefault(stage, {})[first_prompt] = done, total
        counts = steps[stage].values()
        waiting = max(total for _, total in counts) * (len(sets) - len(counts))
        if progress is not None:
            progress(stage, sum(done for done, _ in counts), sum(total for _, total in counts) + waiting)

    found: dict[int, MeasuredSet] = {}
    devices = devices_of(options.device, min(options.processes, len(sets)))
    with contextlib.closing(ProcessEngine(devices).map(measure, sets, on_message=report)) as results:
        found.update(results)
    for index in range(len(sets)):
        for label, video in found[index][1]:
            assert options.video_done is not None
            options.video_done(label, video)
    return merge([found[index][0] for index in range(len(sets))])
