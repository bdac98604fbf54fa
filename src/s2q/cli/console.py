"""Logs, errors and progress on stderr.

On a terminal progress is a bar for each stage and each block in work; elsewhere (a file, a pipe, a CI log) it is one
plain line every few seconds, with the time that is left.
"""

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBars
from rich.text import Text

from s2q.common.progress import Progress, StageClock, is_part

SECONDS_BETWEEN_LINES = 5.0
stderr = Console(stderr=True, soft_wrap=True)


def say(message: str) -> None:
    """Write one line for the user to stderr."""
    stderr.print(message, markup=False, highlight=False)


def say_error(message: str) -> None:
    """Write an error in one line to stderr; show the cursor, which a signal can leave hidden as a bar appears."""
    stderr.show_cursor()
    stderr.print(Text.assemble(("error:", "bold red"), " ", message), highlight=False)


def configure_logging(*, debug: bool) -> None:
    """Send logs to stderr and keep the libraries quiet."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch.profiler's own
    handler: logging.Handler = logging.StreamHandler()
    if stderr.is_terminal:
        handler = RichHandler(console=stderr, show_path=False, show_level=debug, log_time_format="%H:%M:%S")
    else:
        handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("s2q")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.DEBUG if debug else logging.INFO if stderr.is_terminal else logging.WARNING)
    if not debug:
        warnings.simplefilter("ignore")


def quiet_libraries() -> None:
    """Switch off the progress bars of diffusers and transformers while they load and save (downloads keep theirs)."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()


@contextmanager
def progress() -> Iterator[Progress]:
    """Show the progress of a command's stages; yield what they report to."""
    if not stderr.is_terminal:
        yield _PlainProgress()
        return
    columns: tuple[Any, ...] = (
        TextColumn("{task.description:<16}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with ProgressBars(*columns, console=stderr, refresh_per_second=4) as bars:
        yield _BarProgress(bars)


class _BarProgress:
    """One bar a stage, and under them one for each part in work, which goes when the part is done."""

    def __init__(self, bars: ProgressBars, clock: Callable[[], float] = time.monotonic) -> None:
        self._bars, self._clock = bars, clock
        self._stages: dict[str, tuple[Any, StageClock]] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        part = is_part(stage)
        if stage not in self._stages:
            if part and done >= total:
                return
            name = f"  {stage.partition(': ')[2]}" if part else stage
            self._stages[stage] = (
                self._bars.add_task(name, total=total, completed=done, left=""),
                StageClock(0 if part else done),
            )
        task, clock = self._stages[stage]
        if part and done >= total:
            self._bars.remove_task(self._stages.pop(stage)[0])
            return
        left = clock.seconds_left(done, total, self._clock())
        self._bars.update(task, completed=done, total=total, left=_left(left) if done < total else "")


class _PlainProgress:
    """One line at the start of a stage, one every few seconds, one at its end; none for parts."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stages: dict[str, tuple[float, StageClock]] = {}
        self._ended: set[str] = set()
        self._last = -float("inf")

    def __call__(self, stage: str, done: int, total: int) -> None:
        if is_part(stage):
            return
        now = self._clock()
        is_new = stage not in self._stages
        started, clock = self._stages.setdefault(stage, (now, StageClock(done)))
        left = clock.seconds_left(done, total, now)
        if done >= total > 0:
            if stage in self._ended:
                return
            self._ended.add(stage)
            say(f"{stage}: {done}/{total}, {format_seconds(now - started)}")
        elif is_new or now - self._last >= SECONDS_BETWEEN_LINES:
            say(", ".join(filter(None, (f"{stage}: {done}/{total}", _left(left)))))
        else:
            return
        self._last = now


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f"{format_seconds(seconds)} left"


def format_seconds(seconds: float) -> str:
    """Return a duration as "7 s", "3:05 min" or "2:03 h"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    high, low, unit = (*divmod(whole, 60), "min") if whole < 3600 else (*divmod(round(whole / 60), 60), "h")
    return f"{high}:{low:02d} {unit}"
