"""One prompt by two models from the same noise, with figures: what `s2q eval` measures of a video, time, memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from s2q.common.devices import peak_memory_bytes, reset_peak_memory
from s2q.common.progress import Progress
from s2q.evaluation.measure import judge_model, run_reference
from s2q.evaluation.settings import EvaluationSettings
from s2q.evaluation.video_metrics import METRICS, VELOCITY
from s2q.generation.defaults import calibrated_generation, frame_rate_of
from s2q.generation.generate import Video
from s2q.generation.prompts import Prompt
from s2q.report.page import PlayerPair
from s2q.ui.offers import Offer, check_pair
from s2q.ui.pipelines import Pipelines, weight_bytes


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Time and memory of one model.

    Attributes:
        seconds: From the prompt to the frames.
        weight_bytes: Weights of the transformers in memory.
        working_bytes: Most memory in use while it generated, above what was in use before; None if not known.
    """

    seconds: float
    weight_bytes: int
    working_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """Two videos of a prompt, their metrics (those of `eval.json`), and what each model took."""

    pair: PlayerPair
    left: Cost
    right: Cost
    frame_rate: int
    settings: Mapping[str, Any]


def generate_side_by_side(
    left: Offer,
    right: Offer,
    *,
    prompt: Prompt,
    seed: int,
    requested: Mapping[str, Any],
    velocity: bool,
    pipelines: Pipelines,
    progress: Progress,
) -> SideBySide:
    """Generate a prompt with two models, from the noise of one seed; the left one is the reference of the metrics.

    Args:
        requested: Fields of `GenerationSettings`; what is missing is the models' own.
        velocity: Whether the right model also answers the calls of the left one, which takes about as long again.
        progress: May raise to stop; nothing is left behind.

    Raises:
        InvalidInputError: If the models cannot be compared, or the prompt, the image or a setting does not fit them.
    """
    check_pair(left, right)
    first, second = pipelines.open(left, right, progress=progress)
    sources = [pipelines.source(offer, progress=progress) for offer in (left, right)]
    settings = EvaluationSettings(
        metrics=tuple(name for name in METRICS if velocity or name != VELOCITY),
        requested=requested,
        recommended=calibrated_generation(sources[1]) or calibrated_generation(sources[0]) or {},
        device=pipelines.device,
    )
    videos: list[Video] = []
    clocks: list[_Clock] = []

    def started() -> _Clock:
        clocks.append(_Clock(pipelines.device, progress))
        return clocks[-1]

    def video_done(_label: str, video: Video) -> None:
        videos.append(video)
        clocks[-1].stop()

    run = run_reference(
        sources[0],
        pipe=first,
        prompts=[prompt],
        seeds=(seed,),
        settings=settings,
        video_done=video_done,
        progress=started(),
    )
    result = judge_model(sources[1], run, pipe=second, video_done=video_done, progress=started())
    costs = [clock.cost(weight_bytes(pipe)) for clock, pipe in zip(clocks, (first, second), strict=True)]
    pair = PlayerPair(
        prompt=str(prompt),
        seed=videos[0].seed,
        reference=videos[0].frames.numpy(),
        student=videos[1].frames.numpy(),
        metrics=result.videos[0].metrics,
        labels=(left.label, right.label),
    )
    return SideBySide(
        pair=pair,
        left=costs[0],
        right=costs[1],
        frame_rate=frame_rate_of(sources[0]),
        settings=run.generation.to_dict(),
    )


class _Clock:
    """Time and memory of one model, from now until its video is there; what answers recorded calls does not count."""

    def __init__(self, device: str, progress: Progress) -> None:
        self._device, self._progress = device, progress
        self._before = peak_memory_bytes(device) if reset_peak_memory(device) else None
        self._started = time.perf_counter()
        self._seconds: float | None = None
        self._peak = 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report progress; the velocity stage begins when the video is there."""
        if stage == "velocity":
            self.stop()
        self._progress(stage, done, total)

    def stop(self) -> None:
        """Take the time, the first time."""
        if self._seconds is None:
            self._seconds = time.perf_counter() - self._started
            self._peak = peak_memory_bytes(self._device)

    def cost(self, weights: int) -> Cost:
        """Return what was measured."""
        assert self._seconds is not None, "the video is there"
        working = None if self._before is None else max(0, self._peak - self._before)
        return Cost(seconds=self._seconds, weight_bytes=weights, working_bytes=working)
