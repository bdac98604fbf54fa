import os
import signal
import tempfile
from pathlib import Path

import pytest

from disk import names
from s2q.common.files import atomic_write_bytes
from s2q.common.temporaries import locked, remove_abandoned, scratch_folder


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The place for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def kill_within(work):
    """Run something in a copy of this process that kills itself at the end."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_what_is_locked_stays_and_what_is_not_is_removed(tmp_path):
    for name in ("held", "left"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
        (tmp_path / f"{name}.file").touch()
    with locked(tmp_path / "held"), locked(tmp_path / "held.file"):
        remove_abandoned(tmp_path.iterdir())
        assert names(tmp_path) == ["held", "held.file"]
    remove_abandoned(tmp_path.iterdir())
    assert names(tmp_path) == []


def test_links_are_not_followed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    remove_abandoned([tmp_path / "link"])
    assert names(tmp_path / "mine") == ["file"]


def test_a_scratch_folder_goes_at_the_end_and_after_an_error(temporary):
    with pytest.raises(KeyError), scratch_folder("video") as folder:
        assert names(temporary) == [folder.name]
        assert folder.name.startswith("s2q-scratch-video-")
        raise KeyError
    assert names(temporary) == []


def test_the_next_scratch_folder_of_a_kind_removes_those_of_killed_processes_only(temporary):
    def killed():
        with scratch_folder("video") as folder:
            (folder / "file").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    kill_within(killed)
    (left,) = temporary.iterdir()
    (temporary / "s2q-video-of-an-earlier-version").mkdir()
    with scratch_folder("trajectories") as other:
        assert left.exists()
        with scratch_folder("video") as folder, scratch_folder("video") as second:
            assert {path.name for path in temporary.iterdir()} == {
                "s2q-video-of-an-earlier-version",
                *(path.name for path in (other, folder, second)),
            }


def test_a_file_is_locked_while_it_is_written(tmp_path, monkeypatch):
    seen = []
    replace = os.replace

    def look(source, target):
        remove_abandoned([Path(source)])
        seen.append(Path(source).exists())
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    atomic_write_bytes(tmp_path / "a", b"x")
    assert seen == [True]
    assert names(tmp_path) == ["a"]
