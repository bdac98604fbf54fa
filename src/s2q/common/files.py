"""Writing files so that a reader sees the old content or the new, never half of it.

A file: temporary file beside it, fsync, rename, fsync of the folder. A failure or an interruption removes the
temporary. Folders are in `s2q.common.outputs`.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from s2q.common.errors import DiskFullError, InvalidInputError, ResourceError, S2QError, causes, first_line

FILE_MODE = 0o644
_CHUNK_BYTES = 1 << 20
_MAX_JSON_BYTES = 1 << 27
_SLUG_LENGTH = 48
PARTIAL = ".partial"
"""Ends the hidden name of a file while it is written."""

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_ONLY_WRITES = (*_DISK_FULL, errno.EROFS, errno.EFBIG)
_NAMED = {os.strerror(number): number for number in _ONLY_WRITES}  # by libraries and programs without `errno`


def canonical_json(obj: Any) -> str:
    """Serialise to JSON that is the same for equal objects: sorted keys, indent 2, UTF-8, a final newline."""
    return json.dumps(obj, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def existing_folder(text: str) -> Path | None:
    """Return the folder that a text of any length names; None if there is none."""
    try:
        path = Path(text)
        return path if path.is_dir() else None
    except (OSError, ValueError):  # longer than a name may be, or with a NUL
        return None


def read_json(path: Path, *, remedy: str) -> dict[str, Any]:
    """Read a JSON object, strictly UTF-8; the remedy ends the message about a damaged one."""
    try:
        content = json.loads(read_limited(path, _MAX_JSON_BYTES).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInputError(f"{path}: cannot be read as JSON ({first_line(error)}); {remedy}") from error
    if not isinstance(content, dict):
        raise InvalidInputError(f"{path}: got a JSON {type(content).__name__}; expected an object; {remedy}")
    return content


def read_limited(path: Path, max_bytes: int) -> bytes:
    """Read a regular file; OSError if it is longer, or a pipe or a device, which may have no end."""
    described = path.stat()
    if not stat.S_ISREG(described.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    with path.open("rb") as file:
        content = file.read(min(described.st_size, max_bytes) + 1)  # allocates as much at once
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"longer than {max_bytes >> 20} MiB")
    return content


def is_plain_name(name: object) -> bool:
    """Tell whether something is the name of a file or a folder, which cannot lead out of the folder that it is in."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def slug(text: str) -> str:
    """Return the letters a to z and digits of a text, joined by hyphens, at most 48 characters; "video" for none."""
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return words[:_SLUG_LENGTH].rstrip("-") or "video"


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's content as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file at once, mode 0644, replacing what was there; its folder must exist.

    The temporary file is locked, as `s2q.common.temporaries` expects.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent)
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), FILE_MODE)
            os.fsync(file.fileno())
            os.replace(temporary, path)
        temporary = None
        fsync_path(path.parent)
    except OSError as error:
        raise write_error(error, path) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file at once; see `atomic_write_bytes`."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: str | Path, obj: Any) -> None:
    """Write canonical JSON at once; NaN and infinity are refused with ValueError."""
    atomic_write_text(path, canonical_json(obj))


def fsync_path(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_error(error: OSError, path: Path) -> InvalidInputError | ResourceError:
    """Build (not raise) the error for a path that cannot be written."""
    if error.errno in _DISK_FULL:
        return DiskFullError(f"{path}: the disk is full; free some space or choose another place")
    reason = error.strerror or str(error)
    return InvalidInputError(f"{path} cannot be written: {reason}; check the folder and its permissions")


def failed_write(error: BaseException, output: Path | None = None) -> OSError | None:
    """Return the failed write that an exception means; None if it means something else.

    A full or read-only disk is one whatever was written, any other error only of a file of the output. Libraries that
    are not written in Python name the error in their text.
    """
    for cause in causes(error):
        if isinstance(cause, S2QError):
            continue
        if isinstance(cause, OSError) and (cause.errno in _ONLY_WRITES or _is_of(cause.filename, output)):
            return cause
        for text, number in _NAMED.items():
            if text in str(cause):
                return OSError(number, text)
    return None


def _is_of(name: object, output: Path | None) -> bool:
    """Whether a file is an output, is in it, or is in a hidden file or folder that belongs to it and is beside it."""
    if output is None or not isinstance(name, str | os.PathLike):
        return False
    inside = os.path.relpath(os.path.abspath(name), output.parent).split(os.sep)[0]
    return inside == output.name or inside.startswith(f".{output.name}.")


@contextlib.contextmanager
def write_errors(output: Path) -> Iterator[None]:
    """Raise every failed write (`failed_write`) as one line that names the file, or else the output."""
    try:
        yield
    except S2QError:
        raise
    except Exception as error:
        cause = failed_write(error, output)
        if cause is None:
            raise
        raise write_error(cause, Path(cause.filename or output)) from error
