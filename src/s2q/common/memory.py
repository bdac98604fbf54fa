"""Memory of tensors: temporary moves to a device, and release from host memory while nobody reads them.

Weights that are read from safetensors files are mapped: the kernel brings a page in when it is read and may drop it at
any time, since the file has it. What was read stays mapped until memory runs short, though, and counts as the process's
own; `page_out` gives it back at once.
"""

import ctypes
import functools
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

Offload = Literal["none", "model", "group"]
"""Offload of a pipeline to a device that may be too small for it; see `generation.offload`."""

_MADV_PAGEOUT = 21  # linux/mman.h, since 5.4; the contents stay, whatever they are backed by
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT, _LARGEST_KEPT = 256 << 20, 32 << 20


def page_out(tensors: Iterable[Tensor]) -> None:
    """Take the memory of tensors out of this process until they are read again; their values stay.

    Meant for tensors mapped from files; what lies in memory of its own would go to the swap space, if there is any.
    Nothing happens where the kernel has no such call, nor to tensors on a GPU.
    """
    advise = _library_function("madvise")
    if advise is None:
        return
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.numel():
            start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if end > start and tensor.is_contiguous():
                advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_PAGEOUT)


@contextmanager
def on_device(modules: Iterable[nn.Module], device: str, *, offload: bool = False) -> Iterator[None]:
    """Have modules on a device for a while; afterwards they hold the very parameters that they held before.

    Unlike `module.to(device)` and back, this does not leave a copy of mapped weights in host memory.

    Args:
        modules: Modules whose direct parameters and buffers are meant, not those of their children
            (`module.modules()` for a whole one); they must not change meanwhile.
        offload: Whether to page out the originals of what is copied to another device.
    """
    target = torch.device(device)
    copies: dict[int, Tensor] = {}
    before: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for module in modules:
            slots: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for slot in slots:
                for name, tensor in slot.items():
                    if tensor is None or _is_on(tensor, target):
                        continue
                    if id(tensor) not in copies:
                        copies[id(tensor)] = _copy(tensor, target)
                        if offload:
                            page_out([tensor])
                    before.append((slot, name, tensor))
                    slot[name] = copies[id(tensor)]
        yield
    finally:
        for slot, name, tensor in before:
            slot[name] = tensor


def outside(module: nn.Module, blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the modules within a module that are in none of some blocks of it."""
    inside = {inner for block in blocks for inner in block.modules()}
    return [inner for inner in module.modules() if inner not in inside]


@contextmanager
def paged(blocks: Sequence[nn.Module], device: str) -> Iterator[None]:
    """Have blocks that are called in this order, again and again, on a device one at a time (group offload).

    A block is copied there before it is called. A GPU copies the next one on another stream meanwhile, so that it
    holds two at most; another order costs waiting, nothing else.
    """
    pager = _Pager(blocks, device)
    with ExitStack() as stack:
        stack.callback(pager.close)
        for index, block in enumerate(blocks):
            stack.callback(block.register_forward_pre_hook(functools.partial(pager.enter, index)).remove)
            stack.callback(block.register_forward_hook(functools.partial(pager.leave, index)).remove)
        yield


class _Pager:
    """The copies of the block at hand, of the one before until it has been computed, and of the next.

    All are allocated on the stream of copies. Memory of a block is released after the host has waited for its end, so
    that no copy overwrites what is still read.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: str) -> None:
        self._blocks, self._device = blocks, device
        self._copies = _copy_stream(device) if torch.device(device).type == "cuda" and blocks else None
        self._here: dict[int, ExitStack] = {}
        self._started: torch.cuda.Event | None = None

    def enter(self, index: int, *_: Any) -> None:
        """Have a block on the device, before it is called."""
        if index not in self._here:
            self.close()
            self._copy(index)
        if self._copies is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_stream(self._copies)
            self._started = stream.record_event()

    def leave(self, index: int, *_: Any) -> None:
        """Copy the next block, once the one before the called one has been computed."""
        if self._started is None:
            return
        self._started.synchronize()
        for other in self._here.keys() - {index}:
            self._here.pop(other).close()
        self._copy((index + 1) % len(self._blocks))

    def close(self) -> None:
        """Take all blocks from the device, once they have been computed."""
        if self._here and self._copies is not None:
            torch.cuda.synchronize(self._device)
        while self._here:
            self._here.popitem()[1].close()

    def _copy(self, index: int) -> None:
        if index not in self._here:
            stack = self._here[index] = ExitStack()
            with nullcontext() if self._copies is None else torch.cuda.stream(self._copies):
                stack.enter_context(on_device(self._blocks[index].modules(), self._device))


def _copy_stream(device: str) -> torch.cuda.Stream:
    index = torch.device(device).index
    return _copy_stream_of(torch.cuda.current_device() if index is None else index)


@functools.cache
def _copy_stream_of(index: int) -> torch.cuda.Stream:
    """The stream of copies to a GPU: always the same, since PyTorch keeps freed memory for its stream alone."""
    return torch.cuda.Stream(index)  # type: ignore[no-untyped-call]


def _is_on(tensor: Tensor, device: torch.device) -> bool:
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    copy = tensor.detach().to(device)
    return nn.Parameter(copy, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


def page_locked_bytes(size: int) -> int:
    """Return what PyTorch's allocator of page-locked host memory takes for a tensor: the next power of two."""
    return 1 << (size - 1).bit_length() if size else 0


def release_page_locked() -> None:
    """Return page-locked host memory that no tensor uses to the system; PyTorch would keep it for later tensors."""
    if torch.cuda.is_available():
        torch._C._host_emptyCache()


def keep_freed_memory() -> None:
    """Have the allocator of glibc keep freed host memory, up to 256 MiB, for what is allocated next.

    Otherwise it returns large blocks to the system and requests them again in the next step, at a page fault for each
    4 KiB of every tensor. The setting is kept until the process ends. A MALLOC_ variable in the environment and
    another allocator are respected.
    """
    mallopt = _library_function("mallopt")
    if mallopt is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt(_TRIM_THRESHOLD, _KEPT)
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)


def to_device(value: Any, device: str, *, dtype: torch.dtype | None = None) -> Any:
    """Return a value with every tensor in its (nested) plain containers on a device, floating ones in a dtype."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None, non_blocking=True)

    return tree_map_only(Tensor, moved, value)


def tensors_of(*modules: nn.Module) -> Iterator[Tensor]:
    """Go through the parameters and buffers of modules."""
    for module in modules:
        yield from chain(module.parameters(), module.buffers())


@functools.cache
def _library_function(name: str) -> Callable[..., int] | None:
    """A function of the C library of Linux, None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function.restype = ctypes.c_int
    return function
