"""Helpers of tests about files: what is in a folder, and calls of `os` that fail."""

import errno
import os
import stat
from pathlib import Path

DISK_FULL = OSError(errno.ENOSPC, "No space left on device")


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


class FailingCall:
    """A function of `os` that fails from the n-th call on."""

    def __init__(self, function, *, fail_from: int, error: BaseException):
        self.function, self.fail_from, self.error, self.calls = function, fail_from, error, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls >= self.fail_from:
            raise self.error
        return self.function(*args, **kwargs)
