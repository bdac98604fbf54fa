"""The calls with which a process changes files, counted, and one of them disturbed.

A call is an event: opening a file for writing, a write of bytes, a flush, a rename, a removal, a folder made. The layer
replaces the functions of `os`, `io` and safetensors with which Python and s2q reach the disk; for the life of a process
(a forked copy, see `faults.server`).
"""

import builtins
import errno
import functools
import io
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import safetensors.torch

_CHANGES = ("rename", "replace", "unlink", "remove", "mkdir", "rmdir", "symlink", "link")
_REMOVALS = ("unlink", "remove", "rmdir")
_COPIES = ("sendfile", "copy_file_range")


@dataclass(frozen=True)
class Fault:
    """A disturbance of an event, by its number from 0.

    Attributes:
        event: None disturbs nothing: events are counted.
        error: The error of this event and of every later one that needs room or a writable disk; 0 sends a signal.
        number: The signal; SIGKILL interrupts a write in the middle.
    """

    event: int | None = None
    error: int = 0
    number: int = signal.SIGKILL


class FileLayer:
    """Counts events and disturbs one; half of the bytes of a disturbed write reach the file."""

    def __init__(self, fault: Fault, log: Callable[[str], None] = lambda line: None) -> None:
        self.fault, self.log, self.count = fault, log, 0

    def install(self) -> None:
        """Replace the functions of this process."""
        for name in _CHANGES:
            setattr(os, name, self._changing(name, getattr(os, name)))
        for name in _COPIES:
            setattr(os, name, self._copying(getattr(os, name)))
        os.fsync = lambda descriptor: self.step("fsync", descriptor)  # a kill of a process loses nothing that it wrote
        os.write = self._writing(os.write)
        os.open = self._opening(os.open)
        io.open = builtins.open = self._file_opening(io.open)
        safetensors.torch.serialize_file = self._serializing(safetensors.torch.serialize_file)

    def step(self, kind: str, target: Any, *, torn: Callable[[], object] = lambda: None) -> None:
        """Count an event; disturb it if it is the one. `torn` writes half of the bytes."""
        number, self.count = self.count, self.count + 1
        self.log(f"{kind} {target}")
        event = self.fault.event
        if event is None or number < event:
            return
        if self.fault.error == 0:
            if number == event:
                if self.fault.number == signal.SIGKILL:
                    torn()
                os.kill(os.getpid(), self.fault.number)
            return
        if kind in _REMOVALS and self.fault.error in (errno.ENOSPC, errno.EDQUOT):
            return  # makes room
        if number == event:
            torn()
        raise OSError(self.fault.error, os.strerror(self.fault.error), None if isinstance(target, int) else str(target))

    def _changing(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def change(path: Any, *args: Any, **kwargs: Any) -> Any:
            self.step(name, path)
            return function(path, *args, **kwargs)

        return change

    def _copying(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def copy(*args: Any, **kwargs: Any) -> Any:
            self.step("write", args[0])
            return function(*args, **kwargs)

        return copy

    def _writing(self, function: Callable[[int, bytes], int]) -> Callable[[int, bytes], int]:
        def write(descriptor: int, data: bytes) -> int:
            if os.path.exists(f"/proc/self/fd/{descriptor}") and not _is_file(descriptor):
                return function(descriptor, data)
            self.step("write", descriptor, torn=lambda: function(descriptor, data[: len(data) // 2]))
            return function(descriptor, data)

        return write

    def _opening(self, function: Callable[..., int]) -> Callable[..., int]:
        def open_descriptor(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR) and not os.fspath(path).startswith(("/dev/", "/proc/")):
                self.step("open", path)
            return function(path, flags, *args, **kwargs)

        return open_descriptor

    def _file_opening(self, function: Callable[..., Any]) -> Callable[..., Any]:
        layer = self

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                view = memoryview(data).cast("B")
                layer.step("write", self.name, torn=lambda: super(File, self).write(view[: len(view) // 2]))
                return super().write(view) or 0

        def open_file(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
            is_file = _is_file(file) if isinstance(file, int) else not os.fspath(file).startswith(("/dev/", "/proc/"))
            if not set(mode) & set("wax+") or not is_file:
                return function(file, mode, buffering, *args, **kwargs)
            if not isinstance(file, int):
                self.step("open", file)
            raw = File(file, mode.replace("b", "").replace("t", ""), opener=kwargs.pop("opener", None))
            buffered: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, *args, **kwargs)

        return open_file

    def _serializing(self, function: Callable[..., None]) -> Callable[..., None]:
        """The Rust library writes by itself, and has errors of its own."""

        def serialize_file(tensors: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            def torn() -> None:
                function(tensors, path, *args, **kwargs)
                os.truncate(path, os.path.getsize(path) // 2)

            try:
                self.step("write", path, torn=torn)
            except OSError as error:
                text = f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
                raise safetensors.SafetensorError(text) from None
            function(tensors, path, *args, **kwargs)

        return serialize_file


def _is_file(descriptor: int) -> bool:
    """Whether a descriptor is of a file on a disk, not of a pipe or a terminal."""
    try:
        return os.path.isfile(os.readlink(f"/proc/self/fd/{descriptor}"))
    except OSError:
        return sys.platform == "darwin"
