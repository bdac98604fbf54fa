"""The reference's recorded trajectories: in memory as far as that goes, then in a temporary folder.

A step of a video takes two latents, with guidance four: 50 steps of CogVideoX at 49×480×720 take 0.4 GiB, of
HunyuanVideo at 129×720×1280 1.4 GiB.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from s2q.generation.trajectory import Trajectory

logger = logging.getLogger(__name__)

_DISK_SHARE = 0.5  # of the free space, at most


class Recordings:
    """Trajectories of batches, in the order in which they were added.

    Args:
        memory_bytes: Memory for them; what is beyond it goes to the disk, up to half of the free space there.

    Attributes:
        num_calls: Recorded calls in all.
    """

    def __init__(self, *, memory_bytes: int) -> None:
        self.num_calls = 0
        self._memory_bytes = memory_bytes
        self._disk_bytes: int | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._batches: list[Trajectory | Path | None] = []

    def has_room(self) -> bool:
        """Whether another trajectory can be kept."""
        return self._memory_bytes > 0 or self._disk_left() > 0

    def add(self, trajectory: Trajectory) -> None:
        """Keep a trajectory, without its frames.

        Args:
            trajectory: Of the next batch.
        """
        trajectory = replace(trajectory, frames=None)
        self.num_calls += len(trajectory.calls)
        if self._memory_bytes > 0:
            self._memory_bytes -= trajectory.num_bytes
            self._batches.append(trajectory)
            return
        self._disk_bytes = self._disk_left() - trajectory.num_bytes
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="s2q-trajectories-")
        path = Path(self._folder.name) / f"{len(self._batches)}.pt"
        torch.save(trajectory, path)
        self._batches.append(path)

    def skip(self) -> None:
        """Note that the next batch was not recorded."""
        if None not in self._batches:
            logger.warning(
                "the velocity error is measured on the first %d batch(es) of videos only: there is no room for more "
                "recordings in memory and in %s (TMPDIR chooses another folder)",
                len(self._batches),
                tempfile.gettempdir(),
            )
        self._batches.append(None)

    def __getitem__(self, batch: int) -> Trajectory | None:
        """Return the trajectory of a batch; None if it was not recorded."""
        found = self._batches[batch]
        if not isinstance(found, Path):
            return found
        trajectory: Trajectory = torch.load(found, weights_only=False)  # written above
        return trajectory

    def _disk_left(self) -> int:
        if self._disk_bytes is None:
            self._disk_bytes = int(_DISK_SHARE * shutil.disk_usage(tempfile.gettempdir()).free)
        return self._disk_bytes
