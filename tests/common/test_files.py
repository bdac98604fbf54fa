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
