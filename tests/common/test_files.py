import errno
import hashlib
import json
import math
import os

import pytest

from disk import DISK_FULL, FailingCall, mode, names
from s2q.common import files
from s2q.common.errors import InvalidInputError, ResourceError


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


def test_a_file_is_on_disk_before_its_name_is(tmp_path, disk_log):
    files.atomic_write_bytes(tmp_path / "a", b"x")
    (content, _), (renamed, target), last = disk_log
    assert (content, renamed, target) == ("fsync", "replace", str(tmp_path / "a"))
    assert last == ("fsync", str(tmp_path))


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


def test_slugs_are_short_lower_case_words():
    assert files.slug("A red Circle, moving LEFT!") == "a-red-circle-moving-left"
    assert files.slug("猫") == "video"
    assert len(files.slug("word " * 40)) <= 48


FULL = "I/O error: No space left on device (os error 28)"


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ResourceError, "out: the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/cache/x"), ResourceError, "/cache/x: the disk is full"),
        (RuntimeError(FULL), ResourceError, "out: the disk is full"),
        (OSError(errno.EROFS, "Read-only file system", "x"), InvalidInputError, "x cannot be written: Read-only"),
        (PermissionError(errno.EACCES, "Permission denied", "{out}/x"), InvalidInputError, "out/x cannot be written"),
        (PermissionError(errno.EACCES, "denied", "{out}/../.out.s2q-run/x"), InvalidInputError, "cannot be written"),
        (PermissionError(errno.EACCES, "Permission denied", "/elsewhere/model"), PermissionError, "elsewhere"),
        (PermissionError(errno.EACCES, "Permission denied", "{out}-model"), PermissionError, "model"),
        (OSError(errno.EIO, "Input/output error"), OSError, "Input/output"),
        (ValueError("a defect"), ValueError, "a defect"),
    ],
)
def test_failed_writes_are_one_clear_error_and_other_errors_pass(tmp_path, error, raised, message):
    if isinstance(error, OSError) and error.filename:
        error.filename = error.filename.format(out=tmp_path / "out")
    with pytest.raises(raised, match=message), files.write_errors(tmp_path / "out"):
        raise error


def test_a_failed_write_is_recognised_by_its_cause(tmp_path):
    with pytest.raises(ResourceError, match="the disk is full"), files.write_errors(tmp_path):
        try:
            raise DISK_FULL
        except OSError as error:
            raise ValueError("cannot save") from error
