"""The reference's recorded trajectories: in memory as far as that goes, then in a temporary folder.

A step of a video takes two latents, with guidance four: 50 steps of CogVideoX at 49×480×720 take 0.4 GiB, of
HunyuanVideo at 129×720×1280 1.4 GiB.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.utils._pytree import tree_map

from s2q.common.files import write_errors
from s2q.common.temporaries import scratch_folder
from s2q.generation.trajectory import Trajectory

logger = logging.getLogger(__name__)

DISK_SHARE = 0.5  # of the free space, at most


@dataclass(frozen=True, kw_only=True)
class _Spilled:
    """A trajectory whose tensors are in a file, each once; its calls have their names in place of them."""

    path: Path
    trajectory: Trajectory

    @classmethod
    def write(cls, trajectory: Trajectory, path: Path) -> _Spilled:
        tensors: dict[str, torch.Tensor] = {}

        def name_of(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            name = f"tensor-{id(leaf)}"
            if name not in tensors:
                tensors[name] = leaf.detach().clone(memory_format=torch.contiguous_format)
            return name

        spilled = cls(path=path, trajectory=_mapped(trajectory, name_of))
        with write_errors(path):
            safetensors.torch.save_file(tensors, path)
        return spilled

    def read(self) -> Trajectory:
        tensors = safetensors.torch.load_file(self.path)
        return _mapped(self.trajectory, lambda leaf: tensors.get(leaf, leaf) if isinstance(leaf, str) else leaf)


def _mapped(trajectory: Trajectory, function: Callable[[Any], Any]) -> Trajectory:
    """Apply a function to every input and output of the calls."""
    calls = [
        replace(call, inputs=tree_map(function, dict(call.inputs)), output=function(call.output))
        for call in trajectory.calls
    ]
    return replace(trajectory, calls=tuple(calls))


class Recordings:
    """Trajectories of batches, in the order in which they were added; what memory has no room for is on the disk."""

    def __init__(self, *, memory_bytes: int, disk_share: float = DISK_SHARE) -> None:
        self._disk_share = disk_share
        self.num_calls = 0
        self.timesteps: tuple[float, ...] = ()
        self._memory_bytes = memory_bytes
        self._disk_bytes: int | None = None
        self._scratch = contextlib.ExitStack()
        self._folder: Path | None = None
        self._batches: list[Trajectory | _Spilled | None] = []

    def has_room(self) -> bool:
        """Whether another trajectory can be kept."""
        return self._memory_bytes > 0 or self._disk_left() > 0

    def add(self, trajectory: Trajectory) -> None:
        """Keep the trajectory of the next batch, without its frames."""
        trajectory = replace(trajectory, frames=None)
        self.num_calls += len(trajectory.calls)
        self.timesteps = tuple(call.timestep for call in trajectory.calls)
        if self._memory_bytes > 0:
            self._memory_bytes -= trajectory.num_bytes
            self._batches.append(trajectory)
            return
        self._disk_bytes = self._disk_left() - trajectory.num_bytes
        if self._folder is None:
            self._folder = self._scratch.enter_context(scratch_folder("trajectories"))
        path = self._folder / f"{len(self._batches)}.safetensors"
        self._batches.append(_Spilled.write(trajectory, path))

    def skip(self) -> None:
        """Note that the next batch was not recorded."""
        if None not in self._batches:
            logger.warning(
                "velocity error: measured on the first %d batch(es) of videos only, because memory and %s are full "
                "(set TMPDIR to another folder)",
                len(self._batches),
                tempfile.gettempdir(),
            )
        self._batches.append(None)

    def __getitem__(self, batch: int) -> Trajectory | None:
        """Return the trajectory of a batch; None if it was not recorded."""
        recorded = self._batches[batch] if batch < len(self._batches) else None
        return recorded.read() if isinstance(recorded, _Spilled) else recorded

    def recorded(self) -> Iterator[Trajectory]:
        """Read the trajectories one by one, in order."""
        for batch in range(len(self._batches)):
            if (trajectory := self[batch]) is not None:
                yield trajectory

    def _disk_left(self) -> int:
        if self._disk_bytes is None:
            self._disk_bytes = int(self._disk_share * shutil.disk_usage(tempfile.gettempdir()).free)
        return self._disk_bytes
