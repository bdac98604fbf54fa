"""Writing files so that a reader sees the old content or the new, never half of it.

A file: temporary file beside it, fsync, rename, fsync of the folder. A failure or an interruption removes the
temporary. Folders are in `s2q.common.outputs`.
"""

import errno
import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from s2q.common.errors import DiskFullError, InvalidInputError, ResourceError, first_line

FILE_MODE = 0o644
_CHUNK_BYTES = 1 << 20
_SLUG_LENGTH = 48
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def canonical_json(obj: Any) -> str:
    """Serialise to JSON that is the same for equal objects: sorted keys, indent 2, UTF-8, a final newline."""
    return json.dumps(obj, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path, *, remedy: str) -> dict[str, Any]:
    """Read a JSON object, strictly UTF-8; the remedy ends the message about a damaged one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInputError(f"{path}: cannot be read as JSON ({first_line(error)}); {remedy}") from error
    if not isinstance(content, dict):
        raise InvalidInputError(f"{path}: got a JSON {type(content).__name__}; expected an object; {remedy}")
    return content


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
    """Write a file at once, mode 0644, replacing what was there; its folder must exist."""
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
    if error.errno in DISK_FULL:
        return DiskFullError(f"{path}: the disk is full; free some space or choose another place")
    reason = error.strerror or str(error)
    return InvalidInputError(f"{path} cannot be written: {reason}; check the folder and its permissions")
