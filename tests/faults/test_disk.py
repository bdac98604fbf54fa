"""A full or read-only disk at every event, existing outputs, and two runs on one folder: refused, or resumable."""

import errno

import pytest

from faults.commands import hashes
from faults.test_kills import check_resumed, spread

MOUNT_SIZES = [16, 64, 200, 400, 800]
"""KiB of a small disk; the run folder and the checkpoint of the tiny model take about 1,300."""


def fail_at_event(commands, arguments, folder, event, error, expected):
    """A run that cannot write from an event on says so in one line, and the same command resumes it."""
    outcome = commands.run([*arguments, folder / "out"], event=event, error=error)
    line = outcome.output.strip().splitlines()[-1]
    code, words = {errno.ENOSPC: (4, "the disk is full"), errno.EROFS: (3, "cannot be written: Read-only")}[error]
    if outcome.code == 0:  # the checkpoint was in place; only removals were left
        assert hashes(folder / "out") == expected
        return
    assert outcome.code == code, outcome
    assert line.startswith("error: "), outcome
    assert words in line, outcome
    assert "Traceback" not in outcome.output
    check_resumed(commands, arguments, folder, expected)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("part", range(4))
def test_a_disk_that_cannot_be_written_ends_the_run_with_one_line_and_it_resumes(
    commands, quantize_tiny, undisturbed, tmp_path, part, error
):
    events, expected = undisturbed
    fail_at_event(commands, quantize_tiny, tmp_path, spread(len(events), 4)[part], error, expected)
