import pytest

from s2q.benchmark.timing import (
    Timing,
    TimingOptions,
    interleave,
    measures_of,
    stopwatch_for,
)


class Clock:
    """Moves only when something says that it takes time."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_contenders_run_in_turn_on_the_same_data_each_round_in_another_order():
    log = []

    def contender(name):
        def measure(data):
            log.append((name, data))
            return 1.0

        return measure

    timings = interleave(
        {name: contender(name) for name in "abc"},
        fresh=lambda round_: f"data {round_}",
        options=TimingOptions(repeats=4, seconds=10.0),
    )
    assert log[:3] == [("a", "data -1"), ("b", "data -1"), ("c", "data -1")], "the warm-up"
    rounds = ["".join(name for name, _ in log[start : start + 3]) for start in range(3, 15, 3)]
    assert rounds == ["abc", "bca", "cab", "abc"]
    assert [data for _, data in log[3:]] == [f"data {index // 3}" for index in range(12)]
    assert {name: len(timing.samples) for name, timing in timings.items()} == {"a": 4, "b": 4, "c": 4}


def test_the_time_limit_counts_from_the_least_number_of_rounds_on():
    def rounds(seconds):
        clock = Clock()

        def measure(_data):
            clock.now += 2.0
            return 1.0

        options = TimingOptions(repeats=10, seconds=seconds)
        timings = interleave({"a": measure}, fresh=lambda _round: None, options=options, clock=clock)
        return len(timings["a"].samples)

    assert rounds(1.0) == 3
    assert rounds(9.0) == 5
    assert rounds(100.0) == 10


def test_short_calls_are_repeated_until_a_sample_is_long_enough():
    clock, calls = Clock(), {"short": 0, "long": 0}

    def run_for(name, milliseconds):
        def run(_data):
            calls[name] += 1
            clock.now += milliseconds / 1000

        return run

    runs = {"short": run_for("short", 0.5), "long": run_for("long", 20.0)}
    options = TimingOptions(repeats=2, seconds=10.0, sample_milliseconds=5.0)
    measures = measures_of(runs, stopwatch_for("cpu", clock), options=options)
    timings = interleave(measures, fresh=lambda _round: None, options=options, clock=clock)
    assert timings["short"].milliseconds == pytest.approx(0.5)
    assert timings["long"].milliseconds == pytest.approx(20.0)
    assert calls == {"short": 2 + 2 * 10, "long": 2 + 2 * 1}


def test_a_ratio_is_the_median_of_the_rounds():
    """The third round was slow for both: that changes no ratio, and no median."""
    own, other = Timing(samples=(1.0, 1.1, 10.0)), Timing(samples=(2.0, 2.2, 20.0))
    assert own.faster_than(other) == pytest.approx(2.0)
    assert other.faster_than(own) == pytest.approx(0.5)
    assert own.milliseconds == 1.1
    assert Timing(samples=(1.0, 2.0, 3.0, 4.0, 5.0)).quartiles == (2.0, 4.0)
    assert Timing(samples=(3.0,)).quartiles == (3.0, 3.0)
