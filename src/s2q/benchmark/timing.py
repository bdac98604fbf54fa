"""Timing contenders against each other: in turn, in the same process, on the same fresh data, medians.

Machines drift (clock, temperature, neighbours). So contenders run in rounds, each round on new random data and in
another order, and a ratio is the median over rounds of the two times of the same round.

Calls shorter than a few milliseconds are repeated inside a sample until it is that long.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[Any], object]
"""A contender: computes something from the data of a round."""

Measure = Callable[[Any], float]
"""Runs a contender on the data of a round and returns milliseconds."""

Stopwatch = Callable[[Callable[[], object], int], float]
"""Runs a function so many times and returns the milliseconds of one call."""

_MAX_CALLS = 200
_MIN_ROUNDS = 3
"""Rounds that are run even if they take longer than `TimingOptions.seconds`."""


@dataclass(frozen=True, kw_only=True)
class TimingOptions:
    """Duration of a measurement.

    Attributes:
        seconds: No further round starts after this time, from the fourth on.
        sample_milliseconds: What a sample should last at least; short calls are repeated.
    """

    repeats: int
    seconds: float
    sample_milliseconds: float = 5.0


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The samples of one contender: milliseconds of a call, by round."""

    samples: tuple[float, ...]

    @property
    def milliseconds(self) -> float:
        """The median."""
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Between them lies the middle half of the samples."""
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high

    def times(self, factor: float) -> Timing:
        """Return the samples of so many calls."""
        return Timing(samples=tuple(factor * sample for sample in self.samples))

    def faster_than(self, other: Timing) -> float:
        """Return how many times faster this is than another contender of the same rounds: 2 is half the time."""
        return statistics.median(theirs / ours for theirs, ours in zip(other.samples, self.samples, strict=True))


def interleave(
    contenders: Mapping[str, Measure],
    *,
    fresh: Callable[[int], Any],
    options: TimingOptions,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Timing]:
    """Measure contenders in turn, in equally many rounds.

    Args:
        fresh: Makes the data of a round from its number, -1 for the warm-up; not timed.
    """
    data = fresh(-1)
    for measure in contenders.values():
        measure(data)
    names = list(contenders)
    samples: dict[str, list[float]] = {name: [] for name in names}
    started = clock()
    for round_ in range(options.repeats):
        if round_ >= _MIN_ROUNDS and clock() - started >= options.seconds:
            break
        del data  # before the next is made
        data = fresh(round_)
        start = round_ % len(names)
        for name in names[start:] + names[:start]:
            samples[name].append(contenders[name](data))
    return {name: Timing(samples=tuple(values)) for name, values in samples.items()}


def measures_of(runs: Mapping[str, Run], stopwatch: Stopwatch, *, options: TimingOptions) -> dict[str, Measure]:
    """Turn functions into what `interleave` takes.

    The first call of each (the warm-up) runs once, to compile and to allocate, and once more to find how many calls
    make a sample.
    """
    calls: dict[str, int] = {}

    def measure(name: str, data: Any) -> float:
        call = functools.partial(runs[name], data)
        if name in calls:
            return stopwatch(call, calls[name])
        call()
        once, wanted = stopwatch(call, 1), options.sample_milliseconds
        calls[name] = _MAX_CALLS if once <= 0 else min(_MAX_CALLS, max(1, math.ceil(wanted / once)))
        return once

    return {name: functools.partial(measure, name) for name in runs}


def stopwatch_for(device: torch.device | str, clock: Callable[[], float] = time.perf_counter) -> Stopwatch:
    """Return how to time a call on a device: by events of the GPU, by the clock elsewhere."""

    def host(call: Callable[[], object], times: int) -> float:
        started = clock()
        for _ in range(times):
            call()
        return (clock() - started) * 1000 / times

    def cuda(call: Callable[[], object], times: int) -> float:
        with torch.cuda.device(device):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            first.record()
            for _ in range(times):
                call()
            last.record()
            torch.cuda.synchronize(device)
            return float(first.elapsed_time(last)) / times

    return cuda if torch.device(device).type == "cuda" else host


def compete(
    runs: Mapping[str, Run], *, fresh: Callable[[int], Any], device: torch.device | str, options: TimingOptions
) -> dict[str, Timing]:
    """Measure functions of the data that `fresh` makes, in turn, as `interleave` does."""
    return interleave(measures_of(runs, stopwatch_for(device), options=options), fresh=fresh, options=options)
