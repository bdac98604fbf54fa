"""Tensors that may exceed host memory: kept there up to a budget, then in files."""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from s2q.common.files import atomic_write_bytes
from s2q.common.memory import page_locked_bytes


class HostMemory:
    """A budget of host memory, in bytes, that several stores share."""

    def __init__(self, budget: int) -> None:
        self.left = budget

    def take(self, size: int) -> bool:
        """Take `size` bytes and return True, if there are as many."""
        if size > self.left:
            return False
        self.left -= size
        return True

    def give_back(self, size: int) -> None:
        """Return bytes that were taken."""
        self.left += size


class TensorStore:
    """Tensors by index and name: in host memory as long as there is some, then in files of a folder named after them.

    What stays in memory is page-locked if it is pinned: copies to a GPU are faster from there.
    """

    def __init__(self, folder: Path, name: str, *, memory: HostMemory, pinned: bool = False) -> None:
        self.folder, self.name, self.memory, self.pinned = folder, name, memory, pinned
        self._kept: dict[int, Mapping[str, Tensor]] = {}

    def put(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Store the tensors of an index; not copied where they are on the CPU and stay in memory."""
        self._drop(index)
        if self.memory.take(self._held_bytes(tensors)):
            self._kept[index] = {name: self._copy(tensor.detach()) for name, tensor in tensors.items()}
            self._path(index).unlink(missing_ok=True)
            return
        content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        atomic_write_bytes(self._path(index), safetensors.torch.save(content))

    def get(self, index: int) -> dict[str, Tensor]:
        """Return the tensors of an index."""
        if index in self._kept:
            return dict(self._kept[index])
        content = safetensors.torch.load_file(self._path(index))
        # Mapped tensors are read from the disk when they are used; for a GPU that is to happen here, ahead of use.
        return {name: tensor.clone() for name, tensor in content.items()} if self.pinned else dict(content)

    def clear(self) -> None:
        """Forget everything."""
        for index in list(self._kept):
            self._drop(index)
        for path in self.folder.glob(f"{self.name}-*.safetensors"):
            path.unlink()

    def _drop(self, index: int) -> None:
        self.memory.give_back(self._held_bytes(self._kept.pop(index, {})))

    def _held_bytes(self, tensors: Mapping[str, Tensor]) -> int:
        sizes = (tensor.nbytes for tensor in tensors.values())
        return sum(page_locked_bytes(size) if self.pinned else size for size in sizes)

    def _copy(self, tensor: Tensor) -> Tensor:
        if not self.pinned:
            return tensor.cpu()
        # straight into page-locked memory: `tensor.cpu().pin_memory()` would copy twice
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)

    def _path(self, index: int) -> Path:
        return self.folder / f"{self.name}-{index:04d}.safetensors"
