"""Evaluating shards, in this process or in several that claim one shard after another."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence

from s2q.common.progress import Tick
from s2q.comparison.folder import CompareFolder
from s2q.comparison.setup import RunPlan
from s2q.comparison.shards import Reports, Shard, evaluate_shard
from s2q.engines.processes import ProcessEngine, Tell, devices_of


def evaluate_shards(
    folder: CompareFolder,
    plan: RunPlan,
    shards: Sequence[Shard],
    *,
    device: str,
    processes: int,
    stepped: Tick,
) -> dict[str, str]:
    """Evaluate shards; results are stored in the folder as soon as they are there.

    Args:
        folder: The comparison.
        plan: What it is.
        shards: What is to be done.
        device: Where to compute; several processes share the GPUs that "cuda" means.
        processes: How many processes take part; 1 computes in this one.
        stepped: Called after every step; one call at a time.

    Returns:
        Why entries failed, by label; later shards are evaluated without a failed entry.

    Raises:
        S2QError: The reference failed, or a process died; finished shards are kept.
    """
    failures: dict[str, str] = {}
    todo = (left for shard in shards if (left := _without(shard, failures)).labels)
    workers = min(processes, len(shards))
    if workers == 1:
        reports = Reports(stepped=stepped, failed=failures.setdefault)
        for shard in todo:
            evaluate_shard(folder, plan, shard, device=device, reports=reports)
        return failures

    def count(failure: tuple[str, str] | None) -> None:
        if failure is None:
            stepped()
        else:
            failures.setdefault(*failure)

    work = functools.partial(_evaluate, folder, plan)
    results = ProcessEngine(devices_of(device, workers)).map(work, todo, on_message=count)
    with contextlib.closing(results):
        for _ in results:
            pass
    return failures


def _evaluate(folder: CompareFolder, plan: RunPlan, shard: Shard, device: str, tell: Tell) -> None:
    reports = Reports(stepped=lambda: tell(None), failed=lambda label, why: tell((label, why)))
    evaluate_shard(folder, plan, shard, device=device, reports=reports)


def _without(shard: Shard, failures: dict[str, str]) -> Shard:
    return Shard(index=shard.index, labels=tuple(label for label in shard.labels if label not in failures))
