"""Evaluate in shards of prompts, which workers claim; each loads the reference and the model.

The shards do not depend on the number of workers, so batches and results do not either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing

from s2q.common.progress import Progress, silent
from s2q.engines.engine import Engine, Work
from s2q.evaluation.scores import EvaluationResult, merge
from s2q.generation.generate import Video

SHARD_PROMPTS = 2
"""Prompts that are generated together, with all seeds."""

Shard = tuple[str, ...]
MeasuredShard = tuple[EvaluationResult, list[tuple[str, Video]]]


def shards_of(prompts: Sequence[str]) -> list[Shard]:
    """Return the prompts, `SHARD_PROMPTS` at a time."""
    return [tuple(prompts[start : start + SHARD_PROMPTS]) for start in range(0, len(prompts), SHARD_PROMPTS)]


def measure_shards(
    engine: Engine,
    work: Work[Shard, MeasuredShard],
    shards: Sequence[Shard],
    *,
    video_done: Callable[[str, Video], None] | None,
    progress: Progress = silent,
) -> EvaluationResult:
    """Measure shards; return the result on all, in their order.

    The work tells the first prompt of its shard, stage, finished steps and steps in all.
    """
    steps: dict[str, dict[str, tuple[int, int]]] = {}

    def report(message: tuple[str, str, int, int]) -> None:
        first_prompt, stage, done, total = message
        steps.setdefault(stage, {})[first_prompt] = done, total
        counts = steps[stage].values()
        waiting = max(total for _, total in counts) * (len(shards) - len(counts))
        progress(stage, sum(done for done, _ in counts), sum(total for _, total in counts) + waiting)

    with closing(engine.map(work, shards, on_message=report)) as results:
        measured = dict(results)
    ordered = [measured[index] for index in range(len(shards))]
    if video_done is not None:
        for _, videos in ordered:
            for label, video in videos:
                video_done(label, video)
    return merge([result for result, _ in ordered])
