"""Evaluating one shard: the reference generates its prompts once, then every entry that lacks it is judged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from s2q.common.errors import (
    DiskFullError,
    S2QError,
    first_line,
    is_out_of_memory,
)
from s2q.common.progress import Tick
from s2q.comparison.entries import FULL_PRECISION
from s2q.comparison.folder import CompareFolder
from s2q.comparison.setup import SHARD_PROMPTS, RunPlan
from s2q.evaluation.evaluate import EvaluationOptions, judge_model, run_reference
from s2q.evaluation.video_metrics import VELOCITY
from s2q.generation.generate import Video

logger = logging.getLogger(__name__)

SHOWN_PROMPTS = 4
"""The first prompts, whose videos of the first seed are kept for the page."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Work to do.

    Attributes:
        index: Index of the shard.
        labels: The entries that lack it.
    """

    index: int
    labels: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Reports:
    """Callbacks for the evaluation of a shard.

    Attributes:
        stepped: Called after every denoising step and every replayed one.
        failed: Called with the label of an entry that failed, and why.
    """

    stepped: Tick
    failed: Callable[[str, str], None]


def evaluate_shard(folder: CompareFolder, plan: RunPlan, shard: Shard, *, device: str, reports: Reports) -> None:
    """Evaluate entries on the prompts of a shard; each result is stored as soon as it is there.

    Args:
        folder: Where results go.
        plan: The comparison.
        shard: What to do.
        device: Where to compute.
        reports: Callbacks.

    Raises:
        S2QError: The reference failed; failures of entries are told instead.
    """

    def options(label: str) -> EvaluationOptions:
        def keep(_name: str, video: Video) -> None:
            position = plan.prompts.index(video.prompt)
            if position < SHOWN_PROMPTS and video.seed == plan.seeds[0]:
                folder.save_frames(label, position, video.frames.numpy())

        return EvaluationOptions(
            metrics=tuple(plan.metrics),
            settings=plan.settings,
            dtype=plan.dtype,
            variant=plan.variant,
            verify=plan.verify,
            device=device,
            lpips_weights=plan.judge("lpips"),
            clip=plan.judge("clip"),
            video_done=keep,
        )

    def progress(_stage: str, done: int, _total: int) -> None:
        if done:
            reports.stepped()

    teacher = run_reference(
        plan.model,
        prompts=plan.shards()[shard.index],
        seeds=plan.seeds,
        options=options(FULL_PRECISION),
        progress=progress,
    )
    for label in shard.labels:
        try:
            model = folder.model_of(plan, label)
            measured = judge_model(model, teacher, options=options(label), progress=progress)
        except DiskFullError:
            raise
        except Exception as error:  # whatever it is, the others go on
            reports.failed(label, failure_of(label, error, "evaluated", device=device))
        else:
            folder.save_shard(plan, label, shard.index, replace(measured, model=label))


def failure_of(label: str, error: Exception, doing: str, *, device: str) -> str:
    """Say why an entry failed, in one sentence; `--debug` shows the traceback of what nobody foresaw.

    Args:
        label: The entry.
        error: What was raised.
        doing: What was being done to it, "evaluated".
        device: Where.
    """
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
    """Return the shards that have work left, each with the entries that lack it.

    Args:
        folder: Where results are.
        plan: The comparison.
        labels: The entries to evaluate.
    """
    found = []
    for index in range(len(plan.shards())):
        lacking = tuple(label for label in labels if folder.load_shard(plan, label, index) is None)
        if lacking:
            found.append(Shard(index=index, labels=lacking))
    return found


def steps_of(plan: RunPlan, shard: Shard, batch_size: int) -> int:
    """Return how often a shard calls `Reports.stepped` if nothing fails.

    Args:
        plan: The comparison.
        shard: The shard.
        batch_size: Videos computed at once.
    """
    videos = min(SHARD_PROMPTS, len(plan.prompts) - shard.index * SHARD_PROMPTS) * len(plan.seeds)
    steps = -(-videos // batch_size) * int(plan.settings["num_inference_steps"])
    return steps * (1 + (2 if VELOCITY in plan.metrics else 1) * len(shard.labels))
