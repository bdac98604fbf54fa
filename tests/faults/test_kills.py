"""kill -9 at random times and at every event of the file layer: the same command resumes, with the same bytes."""

import contextlib
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from reliability import record

from faults.commands import WORKERS, hashes, orphans, session_of, stat_of
from quick import quick


def spread(events, count):
    """Numbers of events, one at random in each of as many equal parts."""
    generator = random.Random(18)
    return [generator.randrange(events * part // count, events * (part + 1) // count) for part in range(count)]


def check_resumed(commands, arguments, folder, expected):
    """The same command again gives the checkpoint of an undisturbed run, and nothing else is left in its folder."""
    outcome = commands.run([*arguments, folder / "out"])
    assert outcome.code == 0, outcome.output
    assert hashes(folder / "out") == expected
    assert [path.name for path in folder.iterdir()] == ["out"]


def kill_at_event(commands, arguments, folder, event, expected):
    outcome = commands.run([*arguments, folder / "out"], event=event)
    assert outcome.code == -signal.SIGKILL, outcome
    check_resumed(commands, arguments, folder, expected)


def kill_after(commands, arguments, folder, seconds, expected):
    """Return whether the run had not ended by itself."""
    pid = commands.start([*arguments, folder / "out"])
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    code = commands.wait(pid)
    if code == 0:
        return False
    assert code == -signal.SIGKILL
    check_resumed(commands, arguments, folder, expected)
    return True


@pytest.mark.parametrize("part", quick(range(10), 1, 8))
def test_a_run_killed_at_a_write_or_rename_resumes_with_the_same_bytes(
    commands, quantize_tiny, undisturbed, tmp_path, part
):
    events, expected = undisturbed
    kill_at_event(commands, quantize_tiny, tmp_path, spread(len(events), 10)[part], expected)


@pytest.mark.parametrize("seconds", quick([0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], 0.5))
def test_a_run_killed_at_any_time_resumes_with_the_same_bytes(commands, quantize_tiny, undisturbed, tmp_path, seconds):
    kill_after(commands, quantize_tiny, tmp_path, seconds, undisturbed[1])


@pytest.mark.faults
def test_300_kills_resume_with_the_same_bytes(commands, quantize_tiny, undisturbed, tmp_path):
    """A kill at every event, and kills at random times until there are 300."""
    events, expected = undisturbed
    for event in range(len(events)):
        (tmp_path / f"event-{event}").mkdir()
        kill_at_event(commands, quantize_tiny, tmp_path / f"event-{event}", event, expected)
    started = time.monotonic()
    commands.run([*quantize_tiny, tmp_path / "timed"])
    duration, generator, timed, ended = time.monotonic() - started, random.Random(18), 0, 0
    while len(events) + timed < max(300, len(events) + 50):
        folder = tmp_path / f"time-{timed + ended}"
        folder.mkdir()
        killed = kill_after(commands, quantize_tiny, folder, generator.uniform(0, duration), expected)
        timed, ended = timed + killed, ended + (not killed)
        duration *= 1 if killed else 0.8  # a machine with other work had measured a long one
    counts = {"at_each_event": len(events), "at_random_times": timed, "equal_sha256": len(events) + timed}
    record("kills of one process", counts)


def two_workers(arguments):
    return [*arguments[:-1], WORKERS, "2", "-o"]


def workers_of(pid):
    """The workers of a command."""
    workers = []
    for child in session_of(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            is_child = stat_of(child)[1] == str(pid)
            if is_child and b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes():
                workers.append(child)
    return workers


def kill_of_two(commands, arguments, folder, seconds, target, expected):
    """Kill a command with two workers, or a worker of it, some seconds after the first worker is there.

    Return how it ended: "resumed" by the same command, "continued" by another worker, or None if nothing was killed.
    """
    pid = commands.start([*arguments, folder / "out"], forks=True)
    while not (workers := workers_of(pid)):
        time.sleep(0.01)
    time.sleep(seconds)
    workers = workers_of(pid)
    victim = pid if target == "command" else workers[-1] if workers else None
    if victim is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    code = commands.wait(pid)
    assert orphans(pid) == []
    if code == 0:
        assert hashes(folder / "out") == expected
        assert [path.name for path in folder.iterdir()] == ["out"]
        return "continued" if victim not in (None, pid) else None
    if target == "worker":  # a worker that cannot start ends the run
        assert code in (1, 4), commands.printed()
        assert "a worker was ended by signal SIGKILL" in commands.printed()
    check_resumed(commands, arguments, folder, expected)
    return "resumed"


@pytest.mark.faults
def test_kills_of_a_run_with_two_workers_and_of_its_workers_give_the_same_bytes(
    commands, quantize_tiny, undisturbed, tmp_path
):
    arguments, expected = two_workers(quantize_tiny), undisturbed[1]
    (tmp_path / "timed").mkdir()
    started = time.monotonic()
    assert commands.run([*arguments, tmp_path / "timed" / "out"], forks=True).code == 0
    duration, generator = time.monotonic() - started, random.Random(18)
    counts = Counter()
    for attempt in range(100):
        target = ("command", "worker")[attempt % 2]
        folder = tmp_path / f"{attempt}"
        folder.mkdir()
        ended = kill_of_two(commands, arguments, folder, generator.uniform(0, duration), target, expected)
        if ended is None:
            duration *= 0.8  # a machine with other work had measured a long one
        else:
            counts[f"{target} killed: {ended}"] += 1
        if counts.total() == 20:
            break
    assert counts["worker killed: continued"] >= 5
    record("kills with two workers", {**counts, "equal_sha256": counts.total(), "no_process_left": counts.total()})
