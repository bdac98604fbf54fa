"""Progress on a terminal and elsewhere, and the time left that both show."""

import io
import os
import pty
import signal
import subprocess
import sys

import pytest
from rich.console import Console
from rich.progress import Progress as ProgressBars
from rich.progress import TextColumn

from s2q.cli import console
from s2q.common.progress import part_of


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def lines(capsys):
    return lambda: capsys.readouterr().err.splitlines()


def test_plain_progress_writes_a_line_every_few_seconds_with_the_time_left(clock, lines):
    report = console._PlainProgress(clock)
    for done in range(101):
        clock.now = done * 0.5
        report("blocks", done, 100)
    written = lines()
    assert written[0] == "blocks: 0/100"
    assert "blocks: 10/100, 45 s left" in written
    assert written[-1] == "blocks: 100/100, 50 s"
    assert len(written) == 11


def test_the_time_left_ignores_what_another_stage_took_before_the_first_step(clock, lines):
    report = console._PlainProgress(clock)
    report("velocity", 0, 40)
    clock.now = 100.0
    for step in range(1, 4):
        report("velocity", step, 40)
        clock.now += 50.0
    assert lines() == [
        "velocity: 0/40",
        "velocity: 1/40",
        "velocity: 2/40, 31:40 min left",
        "velocity: 3/40, 30:50 min left",
    ]


def test_the_time_left_ignores_steps_of_an_interrupted_run(clock, lines):
    report = console._PlainProgress(clock)
    for step in range(90, 93):
        report("collect", step, 100)
        clock.now += 20.0
    assert lines() == ["collect: 90/100", "collect: 91/100", "collect: 92/100, 2:40 min left"]


def test_stages_that_alternate_have_separate_clocks(clock, lines):
    report = console._PlainProgress(clock)
    for step in range(4):
        for stage in ("quantized", "velocity"):
            report(stage, step, 4)
            clock.now += 10.0
    assert lines() == [
        *("quantized: 0/4", "velocity: 0/4", "quantized: 1/4", "velocity: 1/4"),
        *("quantized: 2/4, 40 s left", "velocity: 2/4, 40 s left"),
        *("quantized: 3/4, 20 s left", "velocity: 3/4, 20 s left"),
    ]


def test_bars_show_the_time_left_from_the_first_step_on(clock):
    screen = Console(file=io.StringIO(), width=100)
    with ProgressBars(TextColumn("{task.description}:{task.completed} {task.fields[left]}"), console=screen) as bars:
        report = console._BarProgress(bars, clock)
        shown = []
        for done, now in ((0, 0.0), (1, 100.0), (2, 130.0), (3, 160.0)):
            clock.now = now
            report("velocity", done, 3)
            shown.append(bars.tasks[0].fields["left"])
    assert shown == ["", "", "30 s left", ""]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1:00 min"), (185, "3:05 min"), (3599.6, "1:00 h"), (7384, "2:03 h")]
)
def test_durations_are_written_with_units(seconds, text):
    assert console.format_seconds(seconds) == text


def test_an_error_shows_the_cursor_on_a_terminal_and_nowhere_else(monkeypatch):
    for terminal, start in ((True, "\x1b[?25h"), (False, "error: terminated")):
        shown = io.StringIO()
        monkeypatch.setattr(console, "stderr", Console(file=shown, force_terminal=terminal))
        console.say_error("terminated")
        assert shown.getvalue().startswith(start)


def test_a_part_has_a_bar_under_its_stage_while_it_is_in_work(clock):
    screen = Console(file=io.StringIO(), width=100)
    with ProgressBars(TextColumn("{task.description}"), console=screen) as bars:
        report = console._BarProgress(bars, clock)
        report("blocks", 0, 8)
        for done, now in ((1, 10.0), (2, 14.0)):
            clock.now = now
            report(part_of("blocks", "transformer_blocks.3"), done, 4)
        assert [task.description for task in bars.tasks] == ["blocks", "  transformer_blocks.3"]
        assert bars.tasks[1].fields["left"] == "8 s left"
        report(part_of("blocks", "transformer_blocks.3"), 4, 4)
        report(part_of("blocks", "transformer_blocks.4"), 4, 4)
        assert [task.description for task in bars.tasks] == ["blocks"]


def test_plain_progress_writes_no_lines_for_parts(lines):
    report = console._PlainProgress()
    report("blocks", 0, 8)
    report(part_of("blocks", "transformer_blocks.3"), 1, 4)
    assert lines() == ["blocks: 0/8"]


SHOWS_BARS_UNTIL_IT_IS_STOPPED = """
import time
from s2q import cli
from s2q.cli import console

def forever(arguments):
    with console.progress() as report:
        for step in range(10_000):
            report("blocks", step, 10_000)
            time.sleep(0.01)

cli._invoke = forever
cli.main([])
"""


def test_ctrl_c_leaves_the_cursor_visible_and_names_what_happened():
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", SHOWS_BARS_UNTIL_IT_IS_STOPPED],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
        start_new_session=True,
    )
    os.close(theirs)
    shown = b""
    try:
        while b"blocks" not in shown:
            shown += os.read(ours, 4096)
        child.send_signal(signal.SIGINT)
        while True:
            try:
                received = os.read(ours, 4096)
            except OSError:  # Linux: the other end is closed
                break
            if not received:
                break
            shown += received
    finally:
        child.kill()
        os.close(ours)
    assert child.wait() == 130
    assert shown.rstrip().endswith(b"interrupted")
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")
