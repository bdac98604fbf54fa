import errno
import hashlib
import json
import math
import os
import stat
from pathlib import Path

import pytest

from s2q.core import files
from s2q.core.errors import BusyError, InvalidInputError, ResourceError


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


class FailingCall:
    """Stands for a function of `os`; fails from the n-th call on."""

    def __init__(self, function, *, fail_from: int, error: BaseException):
        self.function, self.fail_from, self.error, self.calls = function, fail_from, error, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls >= self.fail_from:
            raise self.error
        return self.function(*args, **kwargs)


DISK_FULL = OSError(errno.ENOSPC, "No space left on device")


def test_writes_replace_and_leave_nothing_else(tmp_path):
    target = tmp_path / "a.txt"
    files.atomic_write_text(target, "old")
    files.atomic_write_text(target, "naïve")
    assert target.read_bytes() == "naïve".encode()
    assert mode(target) == 0o644
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, step):
    target = tmp_path / "a.bin"
    files.atomic_write_bytes(target, b"old")
    monkeypatch.setattr(files.os, step, FailingCall(getattr(os, step), fail_from=1, error=DISK_FULL))
    with pytest.raises(ResourceError, match="disk is full"):
        files.atomic_write_bytes(target, b"new")
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "a.bin"
    files.atomic_write_bytes(target, b"old")
    monkeypatch.setattr(files.os, "replace", FailingCall(os.replace, fail_from=1, error=KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        files.atomic_write_bytes(target, b"new")
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_writing_into_no_folder_is_an_input_error(tmp_path):
    with pytest.raises(InvalidInputError, match="cannot be written"):
        files.atomic_write_text(tmp_path / "missing" / "a.txt", "x")


@pytest.fixture
def disk_log(monkeypatch):
    """The paths given to fsync and the targets of renames, in order."""
    log = []

    def record(name):
        function = getattr(os, name)

        def call(*args):
            path = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else str(args[1])
            log.append((name, path))
            return function(*args)

        monkeypatch.setattr(files.os, name, call)

    for name in ("fsync", "rename", "replace"):
        record(name)
    return log


def test_a_file_is_on_disk_before_its_name_is(tmp_path, disk_log):
    files.atomic_write_bytes(tmp_path / "a", b"x")
    (content, _), (renamed, target), last = disk_log
    assert (content, renamed, target) == ("fsync", "replace", str(tmp_path / "a"))
    assert last == ("fsync", str(tmp_path))


def test_a_folder_is_on_disk_before_its_name_is(tmp_path, disk_log):
    with files.staged_directory(tmp_path / "out", overwrite=False) as staged:
        (staged / "sub").mkdir()
        (staged / "sub" / "a").write_text("x")
        expected = [("fsync", str(path)) for path in (staged / "sub" / "a", staged / "sub", staged)]
    assert disk_log == [*expected, ("rename", str(tmp_path / "out")), ("fsync", str(tmp_path))]


def test_canonical_json_does_not_depend_on_order():
    one, other = {"b": 1, "a": [1.5, None, "é"]}, {"a": [1.5, None, "é"], "b": 1}
    assert files.canonical_json(one) == files.canonical_json(other)
    assert json.loads(files.canonical_json(one)) == one
    assert files.canonical_json({"b": 1, "a": "é"}) == '{\n  "a": "é",\n  "b": 1\n}\n'


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_json_refuses_what_json_cannot_say(number, tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        files.atomic_write_json(tmp_path / "a.json", {"psnr": number})
    assert names(tmp_path) == []


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 7])
def test_sha256_of_files_longer_than_a_chunk(tmp_path, size):
    data = os.urandom(size)
    (tmp_path / "a").write_bytes(data)
    assert files.sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_staged_folder_appears_only_when_done(tmp_path):
    out = tmp_path / "deep" / "out"
    with files.staged_directory(out, overwrite=False) as staged:
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
    with pytest.raises(type(error)), files.staged_directory(out, overwrite=True) as staged:
        (staged / "a").write_text("x")
        raise error
    assert names(tmp_path) == (["out"] if existing else [])
    assert not existing or (out / "old").read_text() == "old"


def test_overwriting_replaces_the_whole_folder(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with files.staged_directory(out, overwrite=True) as staged:
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

    monkeypatch.setattr(files.os, "rename", only_the_new_one_fails)
    with pytest.raises(OSError, match="Input/output"), files.staged_directory(out, overwrite=True) as staged:
        (staged / "new").write_text("new")
    assert names(out) == ["old"]
    assert names(tmp_path) == ["out"]


def test_a_full_disk_while_staging_is_a_resource_error(tmp_path):
    with pytest.raises(ResourceError, match="disk is full"), files.staged_directory(tmp_path / "out", overwrite=False):
        raise DISK_FULL
    assert names(tmp_path) == []


def test_an_output_that_appears_meanwhile_is_not_touched(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(BusyError, match="another process"), files.staged_directory(out, overwrite=False):
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
        files.check_output(out, overwrite=False)
    if kind != "folder":
        with pytest.raises(InvalidInputError, match="not a folder"):
            files.check_output(out, overwrite=True)
    assert names(tmp_path) == ["out"]


def test_the_current_folder_and_its_parents_are_never_replaced(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    for out in (".", "..", tmp_path):
        with pytest.raises(InvalidInputError, match="current folder"):
            files.check_output(out, overwrite=True)


def test_a_folder_of_something_else_is_not_overwritten(tmp_path):
    out = tmp_path / "photos"
    out.mkdir()
    files.check_output(out, overwrite=True, markers=("s2q/manifest.json",))
    (out / "holiday.jpg").write_text("x")
    with pytest.raises(InvalidInputError, match="not written by this command"):
        files.check_output(out, overwrite=True, markers=("s2q/manifest.json",))
    (out / "s2q").mkdir()
    (out / "s2q" / "manifest.json").write_text("{}")
    files.check_output(out, overwrite=True, markers=("s2q/manifest.json",))


def test_a_parent_that_cannot_hold_the_output_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
        with pytest.raises(InvalidInputError, match="cannot be written"):
            files.check_output(out, overwrite=False)
    assert names(tmp_path) == ["file"]


def test_a_folder_without_write_permission_is_an_input_error(tmp_path, monkeypatch):
    denied = FailingCall(os.mkdir, fail_from=1, error=PermissionError(errno.EACCES, "Permission denied"))
    monkeypatch.setattr(files.tempfile._os, "mkdir", denied)
    with pytest.raises(InvalidInputError, match="Permission denied"):
        files.check_output(tmp_path / "out", overwrite=False)


def test_the_check_leaves_no_trace(tmp_path):
    files.check_output(tmp_path / "deep" / "out", overwrite=False)
    assert names(tmp_path) == []


def test_slugs():
    assert files.slug("A red Circle, moving LEFT!") == "a-red-circle-moving-left"
    assert files.slug("猫") == "video"
    assert len(files.slug("word " * 40)) <= 48
