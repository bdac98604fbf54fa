"""Settings of an evaluation, checked; `evaluate` documents them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from s2q.evaluation.judges.learned import Judges, open_judges

TRAJECTORY_BYTES = 4 * 2**30


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Settings that hold for every model and prompt; `requested` are generation settings by name.

    `recommended` are those that the judged model was calibrated with, `loras` adapters of the reference, `sharing` the
    workers on one GPU.
    """

    metrics: tuple[str, ...] = ()
    requested: Mapping[str, Any] = field(default_factory=dict)
    recommended: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int | None = None
    device: str = "cpu"
    dtype: torch.dtype | str | None = None
    variant: str | None = None
    verify: bool | None = None
    loras: tuple[str, ...] = ()
    lpips_weights: Path | None = None
    clip: Path | None = None
    trajectory_bytes: int = TRAJECTORY_BYTES
    offload: str = "auto"
    sharing: int = 1

    def open_judges(self) -> Judges:
        """Read the weights of the learned judges onto the device."""
        return open_judges(lpips_weights=self.lpips_weights, clip=self.clip, device=self.device)
