"""The reference's recorded trajectories: in memory as far as that goes, then in a temporary folder.

A step of a video takes two latents, with guidance four: 50 steps of CogVideoX at 49×480×720 take 0.4 GiB, of
HunyuanVideo at 129×720×1280 1.4 GiB.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from s2q.generation.trajectory import Trajectory

logger = logging.getLogger(__name__)

DISK_SHARE = 0.5  # of the free space, at most


@dataclass(frozen=True, kw_only=True)
class _Spilled:
    """A trajectory whose tensors are in a file, each once; `leaves` are the inputs and outputs of its calls, flat."""

    path: Path
    trajectory: Trajectory
    leaves: list[Any]
    structure: TreeSpec

    @classmethod
    def write(cls, trajectory: Trajectory, path: Path) -> _Spilled:
        leaves, structure = tree_flatten([(dict(call.inputs), call.output) for call in trajectory.calls])
        tensors = {
            _name(leaf): leaf.detach().clone(memory_format=torch.contiguous_format)
            for leaf in leaves
            if isinstance(leaf, torch.Tensor)
        }
        safetensors.torch.save_file(tensors, path)
        calls = tuple(replace(call, inputs={}, output=call.output.new_empty(0)) for call in trajectory.calls)
        names = [_name(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        return cls(path=path, trajectory=replace(trajectory, calls=calls), leaves=names, structure=structure)

    def read(self) -> Trajectory:
        tensors = safetensors.torch.load_file(self.path)
        leaves = [tensors[leaf] if isinstance(leaf, str) and leaf in tensors else leaf for leaf in self.leaves]
        calls = zip(self.trajectory.calls, tree_unflatten(leaves, self.structure), strict=True)
        return replace(
            self.trajectory,
            calls=tuple(replace(call, inputs=inputs, output=output) for call, (inputs, output) in calls),
        )


def _name(tensor: torch.Tensor) -> str:
    return f"tensor-{id(tensor)}"


class Recordings:
    """Trajectories of batches, in the order in which they were added; what memory has no room for is on the disk."""

    def __init__(self, *, memory_bytes: int, disk_share: float = DISK_SHARE) -> None:
        self._disk_share = disk_share
        self.num_calls = 0
        self._memory_bytes = memory_bytes
        self._disk_bytes: int | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._batches: list[Trajectory | _Spilled | None] = []

    def has_room(self) -> bool:
        """Whether another trajectory can be kept."""
        return self._memory_bytes > 0 or self._disk_left() > 0

    def add(self, trajectory: Trajectory) -> None:
        """Keep the trajectory of the next batch, without its frames."""
        trajectory = replace(trajectory, frames=None)
        self.num_calls += len(trajectory.calls)
        if self._memory_bytes > 0:
            self._memory_bytes -= trajectory.num_bytes
            self._batches.append(trajectory)
            return
        self._disk_bytes = self._disk_left() - trajectory.num_bytes
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="s2q-trajectories-")
        path = Path(self._folder.name) / f"{len(self._batches)}.safetensors"
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
        recorded = self._batches[batch]
        return recorded.read() if isinstance(recorded, _Spilled) else recorded

    def _disk_left(self) -> int:
        if self._disk_bytes is None:
            self._disk_bytes = int(self._disk_share * shutil.disk_usage(tempfile.gettempdir()).free)
        return self._disk_bytes
