"""Temporary files and folders of a process, locked by it, so a later process can remove those of killed ones."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from s2q.common.files import write_errors


def remove_abandoned(paths: Iterable[Path]) -> None:
    """Remove those files and folders that no living process has locked."""
    for path in paths:
        with contextlib.suppress(OSError), locked(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file or folder; raises BlockingIOError if another process holds it."""
    descriptor = os.open(path, os.O_NOFOLLOW | (os.O_RDONLY if path.is_dir() else os.O_RDWR))  # NFS wants RDWR
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def scratch_folder(kind: str) -> Iterator[Path]:
    """Give an empty folder in the place for temporary files; what killed processes left of the kind is removed first.

    It gets its final name when it is locked, so no process takes it for abandoned. Earlier versions locked nothing, and
    had other names.
    """
    root = Path(tempfile.gettempdir())
    remove_abandoned(root.glob(f"s2q-scratch-{kind}-*"))
    with write_errors(root):
        unlocked = Path(tempfile.mkdtemp(prefix=f".s2q-scratch-{kind}-"))
        with locked(unlocked):
            folder = unlocked.rename(root / unlocked.name[1:])
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
