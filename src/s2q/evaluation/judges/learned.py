"""Metrics by learned judges whose weights the user has: LPIPS and CLIP. Without a path there are none of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from s2q.evaluation.judges import clip_score, lpips
from s2q.generation.generate import Video

LPIPS = "lpips"


@dataclass(frozen=True, kw_only=True)
class Judges:
    """The learned judges of an evaluation; None without weights."""

    lpips: lpips.Lpips | None = None
    clip: clip_score.ClipJudge | None = None

    def distances(self, video: Video, base: Video, *, names: Sequence[str]) -> dict[str, float | None]:
        """Return the distance of LPIPS between two videos, if it is among the names."""
        return {LPIPS: self.lpips(video.frames, base.frames)} if self.lpips is not None and LPIPS in names else {}

    def measure(self, video: Video, base: Video, *, names: Sequence[str]) -> dict[str, float | None]:
        """Measure a video against the full-precision one; what CLIP says of that is under `reference_…`."""
        values = self.distances(video, base, names=names)
        if self.clip is not None and any(name in names for name in clip_score.CLIP_METRICS):
            values |= measure_both(self.clip.measure, video, base, names=names)
        return values


def measure_both(
    measure: Callable[[str, torch.Tensor], dict[str, float | None]], video: Video, base: Video, *, names: Sequence[str]
) -> dict[str, float | None]:
    """Measure a video and the full-precision one, each by itself; what is of that one is under `reference_…`."""
    ours, theirs = (measure(side.prompt, side.frames) for side in (video, base))
    values = ours | {f"reference_{name}": value for name, value in theirs.items()}
    return {name: value for name, value in values.items() if name.removeprefix("reference_") in names}


def open_judges(*, lpips_weights: Path | None, clip: Path | None, device: str) -> Judges:
    """Read the judges' weights: LPIPS's file and CLIP's folder."""
    return Judges(
        lpips=None if lpips_weights is None else lpips.Lpips(lpips_weights, device=device),
        clip=None if clip is None else clip_score.ClipJudge(clip, device=device),
    )
