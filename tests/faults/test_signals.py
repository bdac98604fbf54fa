"""SIGINT and SIGTERM at random moments and events: exit code, processes, terminal, and how to resume."""

import contextlib
import os
import pty
import random
import signal
import threading
import time
from pathlib import Path

import pytest
from reliability import record

from faults.commands import hashes, orphans
from faults.test_kills import check_resumed, spread, two_workers
from quick import quick, slow

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
RESUME = "run the same command again to resume"
HIDDEN, SHOWN = "\x1b[?25l", "\x1b[?25h"
CTRL_C = b"\x03"


class Terminal:
    """A terminal that a command writes to; what it shows is read while it runs."""

    def __init__(self) -> None:
        self._master, self._slave = pty.openpty()
        self.name, self._read = os.ttyname(self._slave), bytearray()
        self._reader = threading.Thread(target=self._collect, daemon=True)
        self._reader.start()

    def _collect(self) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(self._master, 4096):
                self._read += data

    def press_ctrl_c(self) -> None:
        os.write(self._master, CTRL_C)

    @property
    def shown(self) -> str:
        return self._read.decode(errors="replace")

    def close(self) -> str:
        """Close it; return all that was shown."""
        os.close(self._slave)
        self._reader.join(timeout=5)
        os.close(self._master)
        return self.shown


def check_ended(code, shown, number, run_folder):
    """The exit code is the signal's, the last line says so and how to resume, and the cursor is shown."""
    assert code == CODES[number], (code, shown)
    assert shown.rfind(SHOWN) >= shown.rfind(HIDDEN), shown
    line = " ".join(shown.split())
    assert f"error: {WORDS[number]}" in line.replace("\x1b[1;31m", "").replace("\x1b[0m", ""), shown
    assert (RESUME in line) == run_folder.exists(), shown
    assert "Traceback" not in shown


def signal_on_terminal(commands, arguments, folder, number, seconds, *, forks=False):
    """Send a signal to a run on a terminal, Ctrl-C for SIGINT, some seconds after it has shown something.

    Return whether it had not ended by itself.
    """
    terminal = Terminal()
    pid = commands.start([*arguments, folder / "out"], output=Path(terminal.name), forks=forks)
    while not terminal.shown:
        time.sleep(0.01)
    time.sleep(seconds)
    if number == signal.SIGINT:
        terminal.press_ctrl_c()
    else:
        os.kill(pid, number)
    code = commands.wait(pid)
    left = orphans(pid)
    shown = terminal.close()
    assert left == []
    if (folder / "out").exists():  # in the moment between the output and the end of the command
        assert code in (0, CODES[number]), (code, shown)
        return False
    check_ended(code, shown, number, folder / ".out.s2q-run")
    assert [path.name for path in folder.iterdir()] in ([], [".out.s2q-run"])
    return True


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
@pytest.mark.parametrize("part", quick(range(3), 1))
def test_a_signal_at_an_event_ends_the_run_with_its_exit_code_and_it_resumes(
    commands, quantize_tiny, undisturbed, tmp_path, part, number
):
    events, expected = undisturbed
    event = spread(len(events), 3)[part]
    outcome = commands.run([*quantize_tiny, tmp_path / "out"], event=event, number=number)
    check_ended(outcome.code, outcome.output, number, tmp_path / ".out.s2q-run")
    if not (tmp_path / "out").exists():
        check_resumed(commands, quantize_tiny, tmp_path, expected)
    assert hashes(tmp_path / "out") == expected


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_a_signal_to_a_run_on_a_terminal_shows_the_cursor(commands, quantize_tiny, undisturbed, tmp_path, number):
    assert signal_on_terminal(commands, quantize_tiny, tmp_path, number, 0)
    check_resumed(commands, quantize_tiny, tmp_path, undisturbed[1])


@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGINT, 3.0), slow(signal.SIGTERM, 9.0)], ids=["INT", "TERM"])
def test_a_signal_to_a_run_with_two_workers_leaves_no_process(
    commands, quantize_tiny, undisturbed, tmp_path, number, seconds
):
    if signal_on_terminal(commands, two_workers(quantize_tiny), tmp_path, number, seconds):
        check_resumed(commands, quantize_tiny, tmp_path, undisturbed[1])


@pytest.mark.faults
def test_signals_at_50_random_moments_with_two_workers(commands, quantize_tiny, undisturbed, tmp_path):
    _, expected = undisturbed
    arguments = two_workers(quantize_tiny)
    (tmp_path / "timed").mkdir()
    started = time.monotonic()
    assert commands.run([*arguments, tmp_path / "timed" / "out"], forks=True).code == 0
    duration, generator, counts, ended = time.monotonic() - started, random.Random(18), dict.fromkeys(CODES, 0), 0
    assert hashes(tmp_path / "timed" / "out") == expected
    while sum(counts.values()) < 50:
        number = min(counts, key=counts.get)
        folder = tmp_path / f"signal-{sum(counts.values()) + ended}"
        folder.mkdir()
        if signal_on_terminal(commands, arguments, folder, number, generator.uniform(0, duration), forks=True):
            counts[number] += 1
            check_resumed(commands, quantize_tiny, folder, expected)
        else:
            ended, duration = ended + 1, 0.8 * duration  # a machine with other work had measured a long one
    signals = {number.name: count for number, count in counts.items()}
    right = {"exit_code": 50, "no_process_left": 50, "cursor_shown": 50, "resumed_with_equal_sha256": 50}
    record("signals with two workers", {"signals": signals, **right, "ended_before_the_signal": ended})


@pytest.mark.faults
def test_a_signal_at_every_event_ends_the_run_and_it_resumes(commands, quantize_tiny, undisturbed, tmp_path):
    """SIGINT and SIGTERM take turns."""
    events, expected = undisturbed
    for event in range(len(events)):
        number = list(CODES)[event % 2]
        folder = tmp_path / f"event-{event}"
        folder.mkdir()
        outcome = commands.run([*quantize_tiny, folder / "out"], event=event, number=number)
        check_ended(outcome.code, outcome.output, number, folder / ".out.s2q-run")
        if not (folder / "out").exists():
            check_resumed(commands, quantize_tiny, folder, expected)
        assert hashes(folder / "out") == expected
    record("signals at every event", {"events": len(events), "signals": [number.name for number in CODES]})
