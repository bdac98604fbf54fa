"""Output folders: checks before any work, one lock an output, a staging folder, one rename at the end.

The lock of an output `x` is a file in the hidden folder `.x.s2q-run` beside it. It lists the temporary folders that its
owner makes (`.x.partial-…` while the output is written, `.x.old-…` while one replaces another), so that the next owner
of the same output removes what a killed one left, and nothing else. It also removes what killed writers left of `x` and
of files in the hidden folder (`.y.….partial`).
"""

import contextlib
import fcntl
import fnmatch
import glob
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Literal

from s2q.common.errors import BusyError, InvalidInputError, S2QError, short_repr
from s2q.common.files import FILE_MODE, PARTIAL, fsync_path, write_error, write_errors
from s2q.common.interrupts import finish_first
from s2q.common.temporaries import remove_abandoned

DIRECTORY_MODE = 0o755
LOCK = "lock"
_MADE_BY_DESKTOPS = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
_MAX_NAMED = 3

Owned = Callable[[Path], Collection[str] | None]
"""Returns the files that a command wrote into a folder, by relative POSIX path; None if it did not write the folder."""


class OutputLock:
    """The lock of one output, held by this process, in a hidden folder beside it; get one through `output_lock`."""

    def __init__(self, out: Path, folder: Path, descriptor: int) -> None:
        self.out = out
        self.folder = folder
        self._descriptor = descriptor

    def temporary_path(self, kind: Literal["partial", "old"]) -> Path:
        """Return a new hidden name beside the output; whoever takes the lock after a kill removes what has it."""
        path = self.out.with_name(f".{self.out.name}.{kind}-{secrets.token_hex(8)}")
        os.write(self._descriptor, f"{json.dumps(path.name)}\n".encode())
        os.fsync(self._descriptor)
        return path

    def clean(self) -> None:
        """Remove the temporaries of owners and writers that died; an output that one had moved aside is put back."""
        remove_abandoned(self.out.parent.glob(f".{glob.escape(self.out.name)}.*{PARTIAL}"))
        remove_abandoned(self.folder.glob(f".*{PARTIAL}"))
        for path, kind in reversed(self._listed()):
            if kind == "old" and path.is_dir() and not os.path.lexists(self.out):
                os.rename(path, self.out)
            shutil.rmtree(path, ignore_errors=True)

    def release(self) -> None:
        """Give the lock back; its folder is removed if nothing in it is needed by a later run."""
        try:
            if os.listdir(self.folder) == [LOCK] and not any(os.path.lexists(path) for path, _ in self._listed()):
                (self.folder / LOCK).unlink()
                self.folder.rmdir()
        except OSError:  # removed by somebody, or entered by the next owner
            pass
        finally:
            os.close(self._descriptor)

    def _listed(self) -> list[tuple[Path, str]]:
        """The temporary folders of this owner and of those before it, with their kinds."""
        size = os.fstat(self._descriptor).st_size
        temporaries = []
        for line in os.pread(self._descriptor, size, 0).split(b"\n"):
            with contextlib.suppress(ValueError):  # a line cut short by a kill
                name = str(json.loads(line))
                match = re.fullmatch(rf"\.{re.escape(self.out.name)}\.(partial|old)-[0-9a-f]{{16}}", name)
                if match is not None:
                    temporaries.append((self.out.with_name(match[0]), match[1]))
        return temporaries


def lock_folder(out: Path) -> Path:
    """Return the hidden folder that holds the lock of an output; it is there while a run writes or waits to resume."""
    return out.with_name(f".{out.name}.s2q-run")


@contextlib.contextmanager
def output_lock(out: str | Path) -> Iterator[OutputLock]:
    """Hold the lock of a file or folder that a command will write, and remove what a killed owner of it left.

    Missing parents are created, and removed if nothing is written. Failed writes are raised as `write_errors` does.
    """
    out = _absolute(out)
    folder = lock_folder(out)
    missing = [parent for parent in out.parents if not parent.exists()]
    try:
        lock = OutputLock(out, folder, _lock(folder, out))
    except OSError as error:
        raise write_error(error, out) from error
    try:
        with write_errors(out):
            lock.clean()
            yield lock
    finally:
        lock.release()
        with contextlib.suppress(OSError):  # not empty
            for parent in missing:
                parent.rmdir()


def _lock(folder: Path, out: Path) -> int:
    """Take the lock; its file may be removed by the run that ends just now, hence the comparison of inodes."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_APPEND, FILE_MODE)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(descriptor).st_ino == (folder / LOCK).stat().st_ino:
                    return descriptor
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                message = f"{out} is being written by another run; wait for it, or choose another output"
                raise BusyError(message) from error
            raise  # a file system without locks
        os.close(descriptor)


def check_output(out: str | Path, *, overwrite: bool, owned: Owned | None = None) -> None:
    """Check, before any work, that the folder `out` may be written. Creates nothing; removes what killed runs left.

    Args:
        owned: What the command wrote into an existing folder. Only such a folder is replaced, and only if it has no
            other files: `--overwrite` never deletes a user's own. None: any folder may be replaced.
    """
    out = _absolute(out)
    if lock_folder(out).is_dir():
        with contextlib.suppress(S2QError), output_lock(out):  # held by a run at work, or by this one
            pass
    if os.path.lexists(out):
        if not overwrite:
            raise InvalidInputError(f"{out} exists; pass --overwrite to replace it, or choose another name")
        if out.is_symlink() or not out.is_dir():
            raise InvalidInputError(f"{out} is not a folder; remove it or choose another name")
        if Path.cwd().resolve().is_relative_to(out.resolve()):
            raise InvalidInputError(f"{out} contains the current folder and is not replaced; choose another name")
        if os.path.ismount(out):
            raise InvalidInputError(f"{out} is a mount point and cannot be replaced; name a folder inside it")
        if owned is not None:
            check_owned(out, owned)
    check_writable(out)


def check_apart(out: str | Path, source: Path, *, given: str) -> None:
    """Refuse an output that is the folder `source`, which a command reads, or in it, or around it."""
    ours, theirs = Path(out).resolve(), source.resolve()
    if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
        where = "is" if ours == theirs else "is inside of" if ours.is_relative_to(theirs) else "contains"
        raise InvalidInputError(f"{out}: {where} {given}, from which it is made; choose a name outside of that")


def check_writable(out: str | Path) -> None:
    """Check that the folder of a file or folder can be written. Creates nothing."""
    out = _absolute(out)
    try:
        str(out).encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"{short_repr(out.name)}: the name is not UTF-8 text; choose another name") from error
    parent = out.parent
    while not os.path.lexists(parent):
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):  # a file without a name: a kill leaves nothing
            pass
    except OSError as error:
        raise write_error(error, out) from error


def owned_matching(*patterns: str, record: str | None = None) -> Owned:
    """Return an `Owned` of a command whose files have known names; every output has a `record`.

    Patterns are shell-style, part by part: "videos/*.mp4"; a last part "**" matches all below.
    """
    known = (*patterns, record or "")
    temporary = re.compile(rf"\.([^/]+)\.[^./]+{re.escape(PARTIAL)}$")  # of a killed writer

    def owned(folder: Path) -> set[str] | None:
        if record is not None and not (folder / record).is_file():
            return None
        files = {name: temporary.sub(r"\1", name) for name in files_below(folder)}
        return {name for name, final in files.items() if any(_matches(final, pattern) for pattern in known)}

    return owned


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("/"), pattern.split("/")
    if wanted[-1] == "**":
        parts, wanted = parts[: len(wanted) - 1], wanted[:-1]
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def check_owned(out: Path, owned: Owned) -> None:
    """Refuse to replace a folder that holds anything that a command did not write there; names the first files."""
    files = sorted(files_below(out))
    if not files:
        return
    written = owned(out)
    if written is None:
        raise InvalidInputError(
            f"{out} exists and was not written by this command; it is not replaced, choose another name"
        )
    others = [name for name in files if name not in written]
    if others:
        more = f" (and {len(others) - _MAX_NAMED} more)" if len(others) > _MAX_NAMED else ""
        raise InvalidInputError(
            f"{out} contains files that this command did not write, or that were edited since: "
            f"{', '.join(others[:_MAX_NAMED])}{more}; it is not replaced, move them out of it or choose another name"
        )


def files_below(root: Path) -> Iterator[str]:
    """Everything below a folder except folders, by relative POSIX path; links are not followed."""
    for folder, folders, files in os.walk(root):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        for name in (*files, *links):
            if name not in _MADE_BY_DESKTOPS:
                yield Path(folder, name).relative_to(root).as_posix()


@contextlib.contextmanager
def staged_directory(
    out: str | Path, *, overwrite: bool, owned: Owned | None = None, lock: OutputLock | None = None
) -> Iterator[Path]:
    """Give a temporary folder beside `out` that becomes `out` when the block ends without an exception.

    With `overwrite`, the old folder is moved aside and deleted only after the new one is in its place; if that fails,
    it is put back. Files end with mode 0644, folders with 0755. A lock that the caller holds is used, else one is taken
    for as long as the block runs.
    """
    out = _absolute(out)
    check_output(out, overwrite=overwrite, owned=owned)
    with contextlib.nullcontext(lock) if lock is not None else output_lock(out) as held:
        check_output(out, overwrite=overwrite, owned=owned)  # the owner before may have been here meanwhile
        out.parent.mkdir(parents=True, exist_ok=True)
        staged = held.temporary_path("partial")
        try:
            staged.mkdir(mode=0o700)
            yield staged
            _settle(staged)
            with finish_first():
                _put_in_place(staged, held, overwrite=overwrite)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def check_file_output(path: Path, *, overwrite: bool, owned: Callable[[Path], bool] | None = None) -> None:
    """Check, before any work, that a file may be written.

    Args:
        owned: Whether the command wrote an existing file; only such a file is replaced. None: any file may be.
    """
    if path.is_dir():
        raise InvalidInputError(f"{path} is a folder; pass a file")
    if overwrite and owned is not None and path.exists() and not owned(path):
        raise InvalidInputError(
            f"{path} exists and was not written by this command; it is not replaced, choose another name"
        )
    check_writable(path) if overwrite and path.exists() else check_output(path, overwrite=False)


@contextlib.contextmanager
def staged_file(out: str | Path, *, overwrite: bool, owned: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Give the path of a file in a temporary folder that becomes `out` when the block ends without an exception."""
    out = _absolute(out)
    check_file_output(out, overwrite=overwrite, owned=owned)
    with output_lock(out) as held:
        out.parent.mkdir(parents=True, exist_ok=True)
        staged = held.temporary_path("partial")
        try:
            staged.mkdir(mode=0o700)
            yield staged / out.name
            _settle(staged)
            check_file_output(out, overwrite=overwrite, owned=owned)  # somebody may have been here meanwhile
            with finish_first():
                os.replace(staged / out.name, out)
                fsync_path(out.parent)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def _put_in_place(staged: Path, lock: OutputLock, *, overwrite: bool) -> None:
    out = lock.out
    old: Path | None = None
    if os.path.lexists(out):
        if not overwrite:
            raise BusyError(f"{out} was created while it was being computed; another process may be writing it")
        old = lock.temporary_path("old")
        os.rename(out, old)
    try:
        os.rename(staged, out)
    except BaseException:
        if old is not None:
            os.rename(old, out)
        raise
    fsync_path(out.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _settle(root: Path) -> None:
    """Set the modes of everything under `root` and flush it to the disk, the folders after their content."""
    for folder, _, files in os.walk(root, topdown=False):
        for name in files:
            path = Path(folder, name)
            if not path.is_symlink():
                path.chmod(FILE_MODE)
                fsync_path(path)
        Path(folder).chmod(DIRECTORY_MODE)
        fsync_path(Path(folder))


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(path))
