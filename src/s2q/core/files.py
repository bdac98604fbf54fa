"""Writing files and folders so that a reader sees the old content or the new, never half of it.

A file: temporary file beside it, fsync, rename, fsync of the folder. A folder: everything under a hidden name beside
the target, fsync of every file, one rename at the end. A failure or an interruption removes the temporary.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from s2q.core.errors import BusyError, DiskFullError, InvalidInputError, ResourceError

FILE_MODE = 0o644
DIRECTORY_MODE = 0o755
_CHUNK_BYTES = 1 << 20
_SLUG_LENGTH = 48
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def canonical_json(obj: Any) -> str:
    """Serialise to JSON that is the same for equal objects: sorted keys, indent 2, UTF-8, a final newline.

    Args:
        obj: Plain dicts with string keys, lists, strings, numbers, booleans, None.

    Returns:
        The text.

    Raises:
        ValueError: If a number is NaN or infinite: JSON has no such number, use None.
    """
    return json.dumps(obj, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def slug(text: str) -> str:
    """Return a text as part of a file name: lower case, words joined by hyphens, at most 48 characters.

    Args:
        text: A prompt.

    Returns:
        Letters a to z, digits and hyphens; "video" if the text has none of the former.
    """
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return words[:_SLUG_LENGTH].rstrip("-") or "video"


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's content as 64 hexadecimal digits.

    Args:
        path: The file.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file at once, mode 0644, replacing what was there.

    Args:
        path: The file; its folder must exist.
        data: Its content.

    Raises:
        InvalidInputError: If the folder cannot be written.
        ResourceError: If the disk is full; what was there is still there.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), FILE_MODE)
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
        _fsync(path.parent)
    except OSError as error:
        raise _explain(error, path) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file at once; see `atomic_write_bytes`.

    Args:
        path: The file; its folder must exist.
        text: Its content.
    """
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: str | Path, obj: Any) -> None:
    """Write canonical JSON at once; see `canonical_json` and `atomic_write_bytes`.

    Args:
        path: The file; its folder must exist.
        obj: What to serialise; NaN and infinity are refused with ValueError.
    """
    atomic_write_text(path, canonical_json(obj))


def check_output(out: str | Path, *, overwrite: bool, markers: Sequence[str] = ()) -> None:
    """Check, before any work, that the folder `out` may be written. Creates nothing that stays.

    Args:
        out: The folder that a command will write.
        overwrite: Whether an existing one may be replaced.
        markers: Relative paths, one of which an existing non-empty folder must hold to be replaced: guards a user's
            folder of something else against `--overwrite`. Empty: any folder may be replaced.

    Raises:
        InvalidInputError: If `out` exists and may not be replaced, or the folder that is to hold it cannot be written.
    """
    out = _absolute(out)
    if os.path.lexists(out):
        if not overwrite:
            raise InvalidInputError(f"{out} exists; pass --overwrite to replace it, or choose another name")
        if out.is_symlink() or not out.is_dir():
            raise InvalidInputError(f"{out} is not a folder; remove it or choose another name")
        if Path.cwd().resolve().is_relative_to(out.resolve()):
            raise InvalidInputError(f"{out} holds the current folder and is not replaced; choose another name")
        if markers and any(out.iterdir()) and not any((out / marker).exists() for marker in markers):
            raise InvalidInputError(
                f"{out} exists and was not written by this command (none of {', '.join(markers)} in it); "
                "it is not replaced, choose another name"
            )
    parent = out.parent
    while not os.path.lexists(parent):
        parent = parent.parent
    try:
        os.rmdir(tempfile.mkdtemp(prefix=f".{out.name}.probe-", dir=parent))
    except OSError as error:
        raise _explain(error, out) from error


@contextlib.contextmanager
def staged_directory(out: str | Path, *, overwrite: bool, markers: Sequence[str] = ()) -> Iterator[Path]:
    """Give a temporary folder beside `out` that becomes `out` when the block ends without an exception.

    With `overwrite`, the old folder is moved aside and deleted only after the new one is in its place; if that fails,
    it is put back. Files end with mode 0644, folders with 0755.

    Args:
        out: The folder to write; missing parents are created.
        overwrite: Whether an existing one may be replaced.
        markers: See `check_output`.

    Yields:
        The temporary folder, empty, on the same file system.

    Raises:
        InvalidInputError: See `check_output`; raised before anything is created.
        BusyError: If `out` came into being meanwhile.
        ResourceError: If the disk is full.
    """
    out = _absolute(out)
    check_output(out, overwrite=overwrite, markers=markers)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise _explain(error, out) from error
    try:
        yield staged
        _settle(staged)
        _put_in_place(staged, out, overwrite=overwrite)
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise _explain(error, out) from error
        raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _put_in_place(staged: Path, out: Path, *, overwrite: bool) -> None:
    old: Path | None = None
    if os.path.lexists(out):
        if not overwrite:
            raise BusyError(f"{out} came into being while it was being computed; another process may be writing it")
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
        os.rename(out, old)
    try:
        os.rename(staged, out)
    except BaseException:
        if old is not None:
            os.rename(old, out)
        raise
    _fsync(out.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _settle(root: Path) -> None:
    """Set the modes of everything under `root` and flush it to the disk, the folders after their content."""
    for folder, _, files in os.walk(root, topdown=False):
        for name in files:
            path = Path(folder, name)
            if not path.is_symlink():
                path.chmod(FILE_MODE)
                _fsync(path)
        Path(folder).chmod(DIRECTORY_MODE)
        _fsync(Path(folder))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(path))


def _explain(error: OSError, path: Path) -> InvalidInputError | ResourceError:
    if error.errno in _DISK_FULL:
        return DiskFullError(f"{path}: the disk is full; free some space or choose another place")
    reason = error.strerror or str(error)
    return InvalidInputError(f"{path} cannot be written: {reason}; check the folder and its permissions")
