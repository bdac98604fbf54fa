"""What an emulated GPU was asked for: kernels, host synchronisations, copies to the device, bytes."""

from __future__ import annotations

import collections
import sys
import threading
from types import FrameType

from torch import Tensor

from emulation.emulator.guard import DEVICES

_OWN = "/emulation/emulator/"


class Stats:
    """Counts of all devices together since `reset`, and bytes of each device.

    Attributes:
        kernels: Operators that launch one, views and allocations left out.
        operators: How often each operator ran.
        synchronisations: How often the host waited for a device, by operator and line of s2q.
        uploads: Copies from the host, by kind ("pinned", "pageable", "scalar") and line of s2q.
        live: Bytes that are allocated on each device.
        peak: The most of them since `reset_peak`.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a garbage collection inside of it releases tensors
        self._storages: dict[int, list[int]] = {}  # by address: device, tensors, bytes
        self.live = [0] * DEVICES
        self.peak = [0] * DEVICES
        self.reset()

    def reset(self) -> None:
        """Forget the counts, not the bytes."""
        self.kernels = 0
        self.operators: collections.Counter[str] = collections.Counter()
        self.synchronisations: collections.Counter[tuple[str, str]] = collections.Counter()
        self.uploads: collections.Counter[tuple[str, str]] = collections.Counter()

    def reset_peak(self, device: int) -> None:
        """Start the peak of a device from what is allocated now."""
        self.peak[device] = self.live[device]

    def count(self, operator: str, *, is_kernel: bool) -> None:
        """Count a call of an operator."""
        with self._lock:
            self.operators[operator] += 1
            self.kernels += is_kernel

    def count_synchronisation(self, operator: str) -> None:
        """Count a wait of the host."""
        with self._lock:
            self.synchronisations[operator, caller()] += 1

    def count_upload(self, kind: str) -> None:
        """Count a copy from the host."""
        with self._lock:
            self.uploads[kind, caller()] += 1

    def hold(self, inner: Tensor, device: int) -> int:
        """Count a tensor's memory, once for all tensors that share it; return what `release` takes."""
        storage = inner.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        with self._lock:
            entry = self._storages.setdefault(key, [device, 0, size])
            entry[1] += 1
            if entry[1] == 1:
                self.live[device] += size
                self.peak[device] = max(self.peak[device], self.live[device])
        return key

    def release(self, key: int) -> None:
        """Forget a tensor that `hold` counted."""
        with self._lock:
            entry = self._storages[key]
            entry[1] -= 1
            if entry[1] == 0:
                self.live[entry[0]] -= entry[2]
                del self._storages[key]


def caller() -> str:
    """Name the innermost line of s2q that runs, else of anything but torch and the emulator."""
    frame: FrameType | None = sys._getframe(1)
    other = ""
    while frame is not None:
        name = frame.f_code.co_filename
        if "/s2q/" in name and "/tests/" not in name:
            return f"{name[name.rindex('/s2q/') + 1 :]}:{frame.f_code.co_name}"
        if not other and "/torch/" not in name and _OWN not in name:
            other = f"{'/'.join(name.split('/')[-2:])}:{frame.f_code.co_name}"
        frame = frame.f_back
    return other or "?"


STATS = Stats()
