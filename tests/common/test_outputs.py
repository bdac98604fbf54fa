import contextlib
import errno
import os
import subprocess
import sys

import pytest

from disk import DISK_FULL, FailingCall, mode, names
from s2q.common import outputs
from s2q.common.errors import BusyError, InvalidInputError, ResourceError
from s2q.common.outputs import (
    check_output,
    lock_folder,
    output_lock,
    owned_matching,
    staged_directory,
)


def test_a_folder_is_on_disk_before_its_name_is(tmp_path, disk_log):
    with staged_directory(tmp_path / "out", overwrite=False) as staged:
        (staged / "sub").mkdir()
        (staged / "sub" / "a").write_text("x")
        expected = [("fsync", str(path)) for path in (staged / "sub" / "a", staged / "sub", staged)]
    lock = ("fsync", str(lock_folder(tmp_path / "out") / "lock"))
    assert disk_log == [lock, *expected, ("rename", str(tmp_path / "out")), ("fsync", str(tmp_path))]


def test_staged_folder_appears_only_when_done(tmp_path):
    out = tmp_path / "deep" / "out"
    with staged_directory(out, overwrite=False) as staged:
        assert staged.parent == out.parent
        assert staged.name.startswith(".out.partial-")
        (staged / "sub").mkdir()
        (staged / "sub" / "a").write_text("x")
        (staged / "sub" / "a").chmod(0o600)
        assert not out.exists()
    assert (out / "sub" / "a").read_text() == "x"
    assert (mode(out), mode(out / "sub"), mode(out / "sub" / "a")) == (0o755, 0o755, 0o644)
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), SystemExit(1)])
@pytest.mark.parametrize("existing", [True, False])
def test_a_failed_run_leaves_what_was_there(tmp_path, error, existing):
    out = tmp_path / "out"
    if existing:
        out.mkdir()
        (out / "old").write_text("old")
    with pytest.raises(type(error)), staged_directory(out, overwrite=True) as staged:
        (staged / "a").write_text("x")
        raise error
    assert names(tmp_path) == (["out"] if existing else [])
    assert not existing or (out / "old").read_text() == "old"


def test_overwriting_replaces_the_whole_folder(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with staged_directory(out, overwrite=True) as staged:
        (staged / "new").write_text("new")
        assert (out / "old").exists()
    assert names(out) == ["new"]
    assert names(tmp_path) == ["out"]


def test_when_the_last_rename_fails_the_old_folder_is_put_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    rename = os.rename

    def only_the_new_one_fails(source, target):
        if ".partial-" in str(source):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(outputs.os, "rename", only_the_new_one_fails)
    with pytest.raises(OSError, match="Input/output"), staged_directory(out, overwrite=True) as staged:
        (staged / "new").write_text("new")
    assert names(out) == ["old"]
    assert names(tmp_path) == ["out"]


def test_a_full_disk_while_staging_is_a_resource_error(tmp_path):
    with pytest.raises(ResourceError, match="disk is full"), staged_directory(tmp_path / "out", overwrite=False):
        raise DISK_FULL
    assert names(tmp_path) == []


def test_an_output_that_appears_meanwhile_is_not_touched(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(BusyError, match="another process"), staged_directory(out, overwrite=False):
        out.mkdir()
        (out / "other").write_text("x")
    assert names(tmp_path) == ["out"]
    assert names(out) == ["other"]


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_existing_output_needs_overwrite(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.write_text("x")
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(InvalidInputError, match="--overwrite"):
        check_output(out, overwrite=False)
    if kind != "folder":
        with pytest.raises(InvalidInputError, match="not a folder"):
            check_output(out, overwrite=True)
    assert names(tmp_path) == ["out"]


def test_the_current_folder_and_its_parents_are_never_replaced(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    for out in (".", "..", tmp_path):
        with pytest.raises(InvalidInputError, match="current folder"):
            check_output(out, overwrite=True)


def test_a_parent_that_cannot_hold_the_output_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
        with pytest.raises(InvalidInputError, match="cannot be written"):
            check_output(out, overwrite=False)
    assert names(tmp_path) == ["file"]


def test_a_folder_without_write_permission_is_an_input_error(tmp_path, monkeypatch):
    denied = FailingCall(open, fail_from=1, error=PermissionError(errno.EACCES, "Permission denied"))
    monkeypatch.setattr(outputs.tempfile, "TemporaryFile", denied)
    with pytest.raises(InvalidInputError, match="Permission denied"):
        check_output(tmp_path / "out", overwrite=False)


def test_the_check_leaves_no_trace(tmp_path):
    check_output(tmp_path / "deep" / "out", overwrite=False)
    assert names(tmp_path) == []


OWNED = owned_matching("*.mp4", "sub/**", record="record.json")
FOREIGN = (
    ".m.old-2024.s2q-run",  # the run folder of an output "m.old-2024"
    ".m.old-thesis",
    ".m.partial-notes",
    ".m.old-0123456789abcdef",  # of the right form, but not made by an owner of m
    ".m.partial-0123456789abcdef",
    ".m2.partial-0123456789abcdef",
    ".n.partial-0123456789abcdef",
    "m.partial-0123456789abcdef",
)
DIES = """
import os, sys
from pathlib import Path
from s2q.common import outputs
out, moment = Path(sys.argv[1]), sys.argv[2]
rename = os.rename

def dying(source, target):
    if moment == "before" or (moment == "between" and ".partial-" in str(source)):
        os._exit(9)
    rename(source, target)
    if moment == "after" and ".partial-" in str(source):
        os._exit(9)

outputs.os.rename = dying
with outputs.staged_directory(out, overwrite=True) as staged:
    (staged / "new").write_text("new")
    if moment == "inside":
        os._exit(9)
"""


def killed(out, moment):
    """Write an output in a process that dies at a moment as a `kill -9` would, without any cleaning."""
    assert subprocess.run([sys.executable, "-c", DIES, str(out), moment], check=False).returncode == 9


@pytest.mark.parametrize("moment", ["inside", "before", "between", "after"])
@pytest.mark.parametrize("existing", [True, False])
def test_the_next_owner_removes_what_a_killed_one_left_and_nothing_else(tmp_path, moment, existing):
    out = tmp_path / "m"
    for name in FOREIGN:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    if existing:
        out.mkdir()
        (out / "old").write_text("old")
    killed(out, moment)
    assert len(names(tmp_path)) > len(FOREIGN) + 1  # there is something to clean
    with output_lock(out):
        pass
    placed = moment == "after"
    assert names(tmp_path) == sorted([*FOREIGN, *(["m"] if existing or placed else [])])
    assert all((tmp_path / name / "mine").read_text() == "mine" for name in FOREIGN)
    if existing or placed:
        assert names(out) == ["new" if placed else "old"], "an output that was moved aside is put back"


def test_another_output_of_the_same_folder_is_not_touched_while_it_is_written(tmp_path):
    with staged_directory(tmp_path / "x.partial-a", overwrite=False) as other:
        (other / "a").write_text("x")
        with staged_directory(tmp_path / "x", overwrite=False) as staged:
            (staged / "b").write_text("x")
    assert names(tmp_path) == ["x", "x.partial-a"]


def test_an_output_has_one_writer(tmp_path):
    with staged_directory(tmp_path / "x", overwrite=False) as staged:
        (staged / "a").write_text("x")
        for enter in (output_lock(tmp_path / "x"), staged_directory(tmp_path / "x", overwrite=True)):
            with pytest.raises(BusyError, match="being written by another run"), enter:
                pass
    assert names(tmp_path / "x") == ["a"]
    assert names(tmp_path) == ["x"]


def test_a_file_system_without_locks_is_an_input_error_and_leaks_no_descriptor(tmp_path, monkeypatch):
    def flock(descriptor, _operation):
        opened.append(descriptor)
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    opened = []
    monkeypatch.setattr(outputs.fcntl, "flock", flock)
    with (
        pytest.raises(InvalidInputError, match="out cannot be written: No locks available"),
        output_lock(tmp_path / "out"),
    ):
        pass
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


def test_a_lock_leaves_no_trace(tmp_path):
    for error in (None, RuntimeError("boom"), KeyboardInterrupt()):
        for out in (tmp_path / "x", tmp_path / "deep" / "er" / "x"):
            with contextlib.suppress(RuntimeError, KeyboardInterrupt), output_lock(out) as lock:
                assert names(out.parent) == [".x.s2q-run"] == [lock.folder.name]
                if error is not None:
                    raise error
            assert names(tmp_path) == []


def test_a_lock_keeps_what_a_run_has_finished(tmp_path):
    with output_lock(tmp_path / "x") as lock:
        (lock.folder / "block-000.safetensors").write_text("x")
    assert names(lock_folder(tmp_path / "x")) == ["block-000.safetensors", "lock"]


@pytest.mark.parametrize("name", ["a b", "x[1]*", "ü", "a.partial-0123456789abcdef", "line\nbreak", "\udcff"])
def test_names_of_outputs_are_taken_literally(tmp_path, name):
    out = tmp_path / name
    with output_lock(out) as lock:
        lock.temporary_path("partial").mkdir()
    assert len(names(tmp_path)) == 2
    with output_lock(out):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("line", ['".x.partial-0"', '"../y"', "7", "[1]", "{", "", '".x.other-0123456789abcdef"'])
def test_damaged_lines_of_a_lock_remove_nothing(tmp_path, line):
    (tmp_path / "y").mkdir()
    (tmp_path / ".x.partial-0").mkdir()
    lock_folder(tmp_path / "x").mkdir()
    (lock_folder(tmp_path / "x") / "lock").write_text(line + "\n")
    with output_lock(tmp_path / "x"):
        pass
    assert names(tmp_path) == [".x.partial-0", "y"]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("notes.txt", "did not write.*: notes.txt;"),
        ("deep/notes.txt", "did not write.*: deep/notes.txt;"),
        (".hidden", r"did not write.*: \.hidden;"),
        ("deep/a.mp4", "did not write.*: deep/a.mp4;"),
    ],
)
def test_overwriting_never_deletes_files_of_the_user(tmp_path, file, message):
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    for name in ("record.json", "a.mp4", "sub/b", ".DS_Store"):
        (out / name).write_text("ours")
    check_output(out, overwrite=True, owned=OWNED)
    (out / file).parent.mkdir(exist_ok=True)
    (out / file).write_text("mine")
    with pytest.raises(InvalidInputError, match=message), staged_directory(out, overwrite=True, owned=OWNED):
        pass
    assert (out / file).read_text() == "mine"
    assert names(tmp_path) == ["out"]


def test_links_in_an_output_are_of_the_user(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (out / "record.json").write_text("ours")
    (out / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidInputError, match=": link;"):
        check_output(out, overwrite=True, owned=OWNED)


def test_a_folder_of_something_else_is_not_overwritten(tmp_path):
    out = tmp_path / "photos"
    (out / "empty").mkdir(parents=True)
    check_output(out, overwrite=True, owned=OWNED)
    (out / "holiday.mp4").write_text("x")
    with pytest.raises(InvalidInputError, match="not written by this command"):
        check_output(out, overwrite=True, owned=OWNED)


def test_a_mount_point_is_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(outputs.os.path, "ismount", lambda path: True)
    with pytest.raises(InvalidInputError, match="mount point"):
        check_output(tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("name", ["\udcff", "a\udc80b", "deep\udcff/x"])
def test_names_that_are_not_utf_8_are_refused_before_any_work(tmp_path, name):
    with pytest.raises(InvalidInputError, match="not UTF-8"):
        check_output(tmp_path / name, overwrite=False)
    assert names(tmp_path) == []


def test_what_a_killed_writer_left_goes_with_the_next_owner(tmp_path):
    for name in (".out.json.abcdefgh.partial", ".out.json2.abcdefgh.partial", "out.json.partial"):
        (tmp_path / name).touch()
    with output_lock(tmp_path / "out.json"):
        pass
    assert names(tmp_path) == [".out.json2.abcdefgh.partial", "out.json.partial"]


def test_what_a_killed_run_left_goes_even_if_the_next_one_is_refused(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with output_lock(out) as lock:
        lock.temporary_path("partial").mkdir()
    assert len(names(tmp_path)) == 3
    with pytest.raises(InvalidInputError, match="exists; pass --overwrite"):
        check_output(out, overwrite=False)
    assert names(tmp_path) == ["out"]


def test_files_that_a_killed_writer_left_are_its_commands(tmp_path):
    out = tmp_path / "out"
    (out / "videos").mkdir(parents=True)
    for name in ("record.json", "videos/.a.mp4.abcdefgh.partial"):
        (out / name).touch()
    owned = owned_matching("videos/*.mp4", record="record.json")
    check_output(out, overwrite=True, owned=owned)
    (out / "videos" / ".a.txt.abcdefgh.partial").touch()
    with pytest.raises(InvalidInputError, match="did not write"):
        check_output(out, overwrite=True, owned=owned)
