"""SIGINT and SIGTERM: ends of a process that wait until a write is finished, and say how to resume."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from s2q.common.errors import ResourceError

ENDINGS = (signal.SIGINT, signal.SIGTERM)

ARRIVED: list[int] = []
"""Those that the command line has got. Libraries turn their exception into one of their own: pydantic does while it
builds a model, at its import."""


@contextlib.contextmanager
def finish_first() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait until what is within is done; other threads than the main one never get them."""
    arrived: list[int] = []

    def remember(number: int, _frame: Any) -> None:
        arrived.append(number)

    with contextlib.ExitStack() as stack:
        stack.callback(lambda: signal.raise_signal(arrived[0]) if arrived else None)
        if threading.current_thread() is threading.main_thread():
            for number in ENDINGS:
                previous = signal.getsignal(number)
                if previous not in (None, signal.SIG_IGN):
                    stack.callback(signal.signal, number, previous)
                    signal.signal(number, remember)
        yield


@contextlib.contextmanager
def resumable(kept: Path) -> Iterator[None]:
    """Add how to resume to what ends a command early, if the file or folder of finished results is there."""
    try:
        yield
    except BaseException as error:
        is_early = isinstance(error, ResourceError) or not isinstance(error, Exception) or bool(ARRIVED)
        if kept.exists() and is_early:
            error.add_note("run the same command again to resume: finished results are kept")
        raise
