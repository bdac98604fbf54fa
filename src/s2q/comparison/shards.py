"""Evaluate shards: the reference generates the prompts of a shard once, then every entry that lacks it is judged."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from s2q.common.devices import free_memory
from s2q.common.errors import DiskFullError, S2QError, first_line, is_out_of_memory
from s2q.common.progress import Tick
from s2q.comparison.entries import FULL_PRECISION
from s2q.comparison.folder import CompareFolder
from s2q.comparison.peers import PEERS, load_with_peer
from s2q.comparison.setup import SHARD_PROMPTS, RunPlan
from s2q.engines.engine import Worker, fixed_threads
from s2q.engines.options import Workers
from s2q.evaluation.measure import ReferenceRun, judge_model, run_reference
from s2q.evaluation.recordings import DISK_SHARE
from s2q.evaluation.settings import EvaluationSettings
from s2q.evaluation.video_metrics import VELOCITY
from s2q.generation.generate import Video
from s2q.models import ModelSource

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

SHOWN_PROMPTS = 4
"""The first prompts, whose videos of the first seed are kept for the page."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Work to do: the prompts of an index for the entries that lack it."""

    index: int
    labels: tuple[str, ...]


def evaluate_shards(
    folder: CompareFolder, plan: RunPlan, shards: Sequence[Shard], *, where: Workers, most: int | None, stepped: Tick
) -> dict[str, str]:
    """Evaluate shards, which workers claim one after another; each result is stored at once.

    `most` limits a number of workers that the user left open.

    Returns:
        Why entries failed, by label; later shards are evaluated without a failed entry.
    """
    failures: dict[str, str] = {}

    def report(failure: tuple[str, str] | None) -> None:
        if failure is None:
            stepped()
        else:
            failures.setdefault(*failure)

    def remaining() -> Iterator[Shard]:
        for shard in shards:
            labels = tuple(label for label in shard.labels if label not in failures)
            if labels:
                yield replace(shard, labels=labels)

    count = where.planned(len(shards), most=most)
    work = functools.partial(evaluate_shard, folder, plan, disk_share=DISK_SHARE / count, sharing=where.on_one_gpu)
    with (
        fixed_threads(where.device),
        contextlib.closing(where.open(count, modules=(__name__,), shared=folder.path)) as engine,
        contextlib.closing(engine.map(work, remaining(), on_message=report)) as results,
    ):
        for _ in results:
            pass
    return failures


def evaluate_shard(
    folder: CompareFolder,
    plan: RunPlan,
    shard: Shard,
    worker: Worker,
    *,
    disk_share: float = DISK_SHARE,
    sharing: int = 1,
) -> None:
    """Evaluate entries on the prompts of a shard; tell None after every step, and label and reason of a failure."""
    device, tell = worker.device, worker.tell
    settings = EvaluationSettings(
        metrics=tuple(plan.metrics),
        requested=plan.settings,
        device=device,
        dtype=plan.dtype,
        variant=plan.variant,
        verify=plan.verify,
        offload=plan.offload,
        sharing=sharing,
        lpips_weights=plan.judge("lpips"),
        clip=plan.judge("clip"),
    )

    def keep(label: str, _name: str, video: Video) -> None:
        position = plan.prompts.index(video.prompt)
        if position < SHOWN_PROMPTS and video.seed == plan.seeds[0]:
            folder.save_frames(label, position, video.frames.numpy())

    def progress(_stage: str, done: int, _total: int) -> None:
        if done:
            tell(None)

    source = worker.keep("source", plan.source)
    run = run_reference(
        source,
        judges=worker.keep("judges", settings.open_judges),
        prompts=plan.shards()[shard.index],
        seeds=plan.seeds,
        settings=settings,
        video_done=functools.partial(keep, FULL_PRECISION),
        progress=progress,
        disk_share=disk_share,
    )
    for label in shard.labels:
        try:
            model, pipe = _opened(folder, plan, label, source, run, device)
            scores = judge_model(model, run, pipe=pipe, video_done=functools.partial(keep, label), progress=progress)
        except DiskFullError:
            raise
        except Exception as error:  # whatever it is, the others go on
            tell((label, failure_of(label, error, "evaluated", device=device)))
        else:
            folder.save_shard(plan, label, shard.index, replace(scores, model=label))
        finally:
            pipe = None  # the next model takes its place
            free_memory()


def _opened(
    folder: CompareFolder, plan: RunPlan, label: str, source: ModelSource, run: ReferenceRun, device: str
) -> tuple[Any, DiffusionPipeline | None]:
    """The model of an entry; of a peer, which stores none, also the pipeline that it has quantized."""
    peer = plan.entries[label].get("peer")
    if peer is None:
        return folder.model_of(plan, label), None
    prompts = plan.calibration_prompts
    return source, load_with_peer(PEERS[peer["name"]], source, dtype=run.dtype, device=device, prompts=prompts)


def failure_of(label: str, error: Exception, doing: str, *, device: str) -> str:
    """Say why an entry failed, in one sentence; `--debug` shows the traceback of what nobody foresaw."""
    if is_out_of_memory(error):
        why = f"out of memory on {device} while it was {doing}"
    elif isinstance(error, S2QError):
        why = str(error)
    else:
        logger.debug("%s", label, exc_info=error)
        why = f"{type(error).__name__} while it was {doing}: {first_line(error)}"
    logger.warning("%s: %s", label, why)
    return why


def pending_shards(folder: CompareFolder, plan: RunPlan, labels: Sequence[str]) -> list[Shard]:
    """Return the shards that have work left, each with the entries that lack it, or whose frames are damaged."""
    shards = []
    for index in range(len(plan.shards())):
        shown = range(min(SHOWN_PROMPTS, len(plan.prompts))) if index == 0 else ()
        reference = any(folder.has_damaged_frames(FULL_PRECISION, prompt) for prompt in shown)
        lacking = tuple(
            label
            for label in labels
            if reference
            or folder.load_shard(plan, label, index) is None
            or any(folder.has_damaged_frames(label, prompt) for prompt in shown)
        )
        if lacking:
            shards.append(Shard(index=index, labels=lacking))
    return shards


def steps_of(plan: RunPlan, shard: Shard, batch_size: int) -> int:
    """Return the steps of a shard if nothing fails."""
    videos = min(SHARD_PROMPTS, len(plan.prompts) - shard.index * SHARD_PROMPTS) * len(plan.seeds)
    steps = -(-videos // batch_size) * int(plan.settings["num_inference_steps"])
    return steps * (1 + (2 if VELOCITY in plan.metrics else 1) * len(shard.labels))
