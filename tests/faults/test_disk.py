"""A full or read-only disk at every event, existing outputs, and two runs on one folder: refused, or resumable."""

import errno
import time

import pytest
from reliability import record

from faults.commands import hashes
from faults.server import READ_ONLY, REMOUNT
from faults.test_kills import check_resumed, spread
from quick import quick

LARGE = 65536
"""KiB of a disk that has room for a run."""

MESSAGES = {errno.ENOSPC: (4, "the disk is full"), errno.EROFS: (3, "cannot be written: Read-only")}


def check_refused(outcome, error):
    """The command ended with the exit code of the error and one line about it."""
    code, words = MESSAGES[error]
    line = outcome.output.strip().splitlines()[-1]
    assert outcome.code == code, outcome
    assert line.startswith("error: "), outcome
    assert words in line, outcome
    assert "Traceback" not in outcome.output


def fail_at_event(commands, arguments, folder, event, error, expected):
    """A run that cannot write from an event on is refused, and resumed; return False if it only could not clean."""
    outcome = commands.run([*arguments, folder / "out"], event=event, error=error)
    if outcome.code == 0:  # the checkpoint was in place
        assert hashes(folder / "out") == expected
        return False
    check_refused(outcome, error)
    check_resumed(commands, arguments, folder, expected)
    return True


@pytest.mark.parametrize("error", MESSAGES, ids=errno.errorcode.get)
@pytest.mark.parametrize("part", quick(range(3), 1))
def test_a_disk_that_cannot_be_written_ends_the_run_with_one_line_and_it_resumes(
    commands, quantize_tiny, undisturbed, tmp_path, part, error
):
    events, expected = undisturbed
    fail_at_event(commands, quantize_tiny, tmp_path, spread(len(events), 3)[part], error, expected)


def fill_disk(commands, arguments, folder, size, expected):
    """A run on a disk of so many KiB is refused if it is too small, and resumed when it has grown; return whether."""
    disk = commands.mount(folder, size=size)
    outcome = commands.run([*arguments, folder / "out"])
    if outcome.code == 0:
        assert hashes(disk / "out") == expected
        return False
    check_refused(outcome, errno.ENOSPC)
    assert not (disk / "out").exists()
    commands.mount(folder, size=LARGE, flags=REMOUNT)
    outcome = commands.run([*arguments, folder / "out"])
    assert outcome.code == 0, outcome
    assert hashes(disk / "out") == expected
    assert [path.name for path in disk.iterdir()] == ["out"]
    return True


@pytest.fixture
def mounts(commands):
    if not commands.mounts:
        pytest.skip("this system lets no user mount a disk; faults of the file layer replace it")


@pytest.mark.parametrize("size", [16, 400])
def test_a_small_disk_ends_the_run_with_exit_code_4_and_it_resumes_when_there_is_room(
    mounts, commands, quantize_tiny, undisturbed, tmp_path, size
):
    assert fill_disk(commands, quantize_tiny, tmp_path, size, undisturbed[1])


def test_a_read_only_folder_is_refused_before_compute(mounts, commands, quantize_tiny, tmp_path):
    commands.mount(tmp_path, size=LARGE, flags=READ_ONLY)
    outcome = commands.run([*quantize_tiny, tmp_path / "out"])
    check_refused(outcome, errno.EROFS)
    assert "load" not in outcome.output


def test_an_existing_output_is_refused_and_intact(commands, quantize_tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    for overwrite in ([], ["--overwrite"]):
        outcome = commands.run([*quantize_tiny, tmp_path / "out", *overwrite])
        assert outcome.code == 3, outcome
        assert "load" not in outcome.output
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture(scope="module")
def rounded(commands, model, tmp_path_factory):
    """The arguments of a run that replaces a checkpoint without calibration, and hashes of both."""
    folder = tmp_path_factory.mktemp("rounded")
    old, new = ["quantize", "-m", model, "-r", "rtn-w8a8", "-o"], ["quantize", "-m", model, "-r", "rtn-w4a6", "-o"]
    assert commands.run([*old, folder / "old"]).code == 0
    assert commands.run([*old, folder / "out"]).code == 0
    events = commands.events([*new[:-1], "--overwrite", "-o", folder / "out"])
    return old, [*new[:-1], "--overwrite", "-o"], events, hashes(folder / "old"), hashes(folder / "out")


def replace_at_event(commands, rounded, folder, **fault):
    """A disturbed run that replaces a checkpoint leaves the old one or the new one, and the same command ends it."""
    old, new, _, before, after = rounded
    out = folder / "out"
    assert commands.run([*old, out]).code == 0
    commands.run([*new, out], **fault)
    moved = [path for path in folder.iterdir() if path.name.startswith(".out.old-")]
    assert hashes(out if out.exists() else moved[0]) in (before, after)
    outcome = commands.run([*new, out])
    assert outcome.code == 0, outcome
    assert hashes(out) == after
    assert [path.name for path in folder.iterdir()] == ["out"]


def test_a_checkpoint_that_a_failing_run_would_replace_is_intact(commands, rounded, tmp_path):
    renames = [number for number, event in enumerate(rounded[2]) if event.startswith("rename")]
    assert len(renames) == 2
    for name, fault in {
        "full": {"event": renames[0], "error": errno.ENOSPC},
        "killed": {"event": renames[1]},
    }.items():
        (tmp_path / name).mkdir()
        replace_at_event(commands, rounded, tmp_path / name, **fault)


def test_a_second_run_on_the_same_folder_is_busy_and_the_first_one_ends(commands, quantize_tiny, undisturbed, tmp_path):
    first = commands.start([*quantize_tiny, tmp_path / "out"])
    while not (tmp_path / ".out.s2q-run" / "events.jsonl").exists():
        time.sleep(0.01)
    outcome = commands.run([*quantize_tiny, tmp_path / "out"])
    assert outcome.code == 5, outcome
    assert "is being written by another run" in outcome.output
    assert commands.wait(first) == 0
    assert hashes(tmp_path / "out") == undisturbed[1]


@pytest.mark.faults
def test_a_disk_that_fills_at_every_file_and_at_every_size_is_refused_and_resumable(
    commands, quantize_tiny, rounded, undisturbed, tmp_path
):
    """A file has five events: every third one has each file of a run, its opening or its content or its rename."""
    events, expected = undisturbed
    counts = {}
    for error, step in ((errno.ENOSPC, 3), (errno.EROFS, 12)):
        chosen, resumed = range(0, len(events), step), 0
        for event in chosen:
            folder = tmp_path / f"{error}-{event}"
            folder.mkdir()
            resumed += fail_at_event(commands, quantize_tiny, folder, event, error, expected)
        counts[errno.errorcode[error]] = {"events": len(chosen), "refused_and_resumed": resumed}
    for name, error, step in (("SIGKILL", 0, 3), ("ENOSPC", errno.ENOSPC, 12)):
        chosen = range(0, len(rounded[2]), step)
        for event in chosen:
            folder = tmp_path / f"replace-{error}-{event}"
            folder.mkdir()
            replace_at_event(commands, rounded, folder, event=event, error=error)
        counts[f"{name} while a checkpoint is replaced"] = {"events": len(chosen), "old_or_new_intact": len(chosen)}
    if commands.mounts:
        size, filled = 8, 0
        while True:
            folder = tmp_path / f"disk-{size}"
            folder.mkdir()
            if not fill_disk(commands, quantize_tiny, folder, size, expected):
                break
            size, filled = size + 64, filled + 1
        counts["tmpfs"] = {"sizes": filled, "step_kib": 64, "enough_kib": size}
    record("disk", counts)
