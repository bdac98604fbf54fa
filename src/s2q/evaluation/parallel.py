"""Evaluate in shards of prompts, which workers claim; each loads the reference and the model.

The shards do not depend on the number of workers, so batches and results do not either. A worker keeps both models from
shard to shard where the device has room for them, or where they are offloaded and host memory has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

from s2q.common.devices import free_memory
from s2q.common.progress import Progress, silent
from s2q.engines.engine import Engine, Work, Worker
from s2q.engines.options import Workers
from s2q.evaluation.scores import EvaluationResult, merge
from s2q.generation.generate import Video
from s2q.generation.load import models_that_fit
from s2q.generation.offload import is_offloaded
from s2q.models import ModelSource

SHARD_PROMPTS = 2
"""Prompts that are generated together, with all seeds."""

_T = TypeVar("_T")
Shard = tuple[str, ...]
MeasuredShard = tuple[EvaluationResult, list[tuple[str, Video]]]


def shards_of(prompts: Sequence[str]) -> list[Shard]:
    """Return the prompts, `SHARD_PROMPTS` at a time."""
    return [tuple(prompts[start : start + SHARD_PROMPTS]) for start in range(0, len(prompts), SHARD_PROMPTS)]


@dataclass(frozen=True, kw_only=True)
class Room:
    """Room of a worker for a model and its reference together, on its device and in host memory."""

    device: bool
    host: bool

    @classmethod
    def of(cls, sources: Sequence[ModelSource], where: Workers, workers: int) -> Room:
        """Return where each of so many workers has room; memory that is not known is no room."""
        device, host = (models_that_fit(sources, name) or 0 for name in (where.device, "cpu"))
        return cls(device=device >= where.on_one_device(workers), host=host >= where.on_one_machine(workers))

    def use(self, worker: Worker, name: str, load: Callable[[], Any], work: Callable[..., _T]) -> _T:
        """Return what work makes of a model, its argument `pipe`; the worker keeps the model if there is room for both.

        An offloaded model has nothing on the device between calls.
        """
        pipe = worker.kept(name) or load()
        if self.device or (self.host and is_offloaded(pipe)):
            worker.put(name, pipe)
        result = work(pipe=pipe)
        del pipe
        free_memory()  # the next model takes its place
        return result


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
