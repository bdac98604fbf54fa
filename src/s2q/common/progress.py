"""Progress of the stages of a command: the callback, a counter of steps, and the time that is left."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, its finished steps and its steps in all; see `part_of` for parts of a stage."""

Tick = Callable[[], None]
"""Called after each step."""


def silent(stage: str, done: int, total: int) -> None:
    """Report nothing."""


def part_of(stage: str, part: str) -> str:
    """Return the name under which one part of a stage is reported, "blocks: transformer_blocks.3".

    Parts are in work side by side, in several workers; their steps are among those of the stage.
    """
    return f"{stage}: {part}"


def is_part(stage: str) -> bool:
    """Whether a name is that of a part of a stage."""
    return ": " in stage


class StageCounter:
    """Reports a stage when it is made, and one more finished step each time it is called."""

    def __init__(self, progress: Progress | None, stage: str, total: int, *, done: int = 0) -> None:
        self._progress, self._stage, self._total, self._done = progress or silent, stage, total, done
        self._progress(stage, done, total)

    def __call__(self) -> None:
        """Report one more finished step."""
        self._done += 1
        self._progress(self._stage, self._done, self._total)


class StageClock:
    """Estimates the time left in one stage from the rate since its first step ended.

    What comes before does not count: a stage may be announced while another one works, or resume an interrupted run.
    """

    def __init__(self, done: int) -> None:
        self._reported = done
        self._first_step: tuple[float, int] | None = None

    def seconds_left(self, done: int, total: int, now: float) -> float | None:
        """Take one report and return the seconds left, None before the second step."""
        if self._first_step is None:
            if done > self._reported:
                self._first_step = now, done
            return None
        started, first = self._first_step
        return (now - started) / (done - first) * (total - done) if done > first else None
