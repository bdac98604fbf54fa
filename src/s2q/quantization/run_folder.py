"""The folder in which a run keeps what it has finished, so that a killed run goes on where it was.

It lies beside the output as `.{name}.s2q-run`: a lock (one process at a time), the results of the blocks, each with the
fingerprint of its inputs and the SHA-256 of its file, and the events. It is removed when the checkpoint is in place.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from s2q.core.errors import BusyError, InvalidInputError
from s2q.core.files import atomic_write_bytes, atomic_write_json, sha256_file

_LOCK = "lock"
_EVENTS = "events.jsonl"


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """A finished result.

    Attributes:
        tensors: Its tensors by name, on the CPU.
        stats: What was measured while it was made; plain data.
    """

    tensors: Mapping[str, Tensor]
    stats: Mapping[str, Any]


class RunFolder:
    """The run folder of one output, locked by this process; get one through `open_run_folder`.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def has(self, name: str, fingerprint: str) -> bool:
        """Tell whether a result is there, was made from the same inputs, and is intact.

        Args:
            name: Name of the result, "block-003".
            fingerprint: Hash of everything that it depends on.
        """
        record = self._record(name)
        if record is None or record.get("fingerprint") != fingerprint:
            return False
        path = self.path / f"{name}.safetensors"
        return path.is_file() and sha256_file(path) == record.get("sha256")

    def save(self, name: str, fingerprint: str, artefact: Artefact) -> None:
        """Store a result atomically: it is there entirely, or not at all.

        Args:
            name: Name of the result.
            fingerprint: Hash of everything that it depends on.
            artefact: The result.

        Raises:
            ResourceError: If the disk is full.
        """
        path = self.path / f"{name}.safetensors"
        (self.path / f"{name}.json").unlink(missing_ok=True)
        tensors = {key: tensor.contiguous() for key, tensor in artefact.tensors.items()}
        atomic_write_bytes(path, safetensors.torch.save(tensors))
        record = {"fingerprint": fingerprint, "sha256": sha256_file(path), "stats": dict(artefact.stats)}
        atomic_write_json(self.path / f"{name}.json", record)

    def load(self, name: str) -> Artefact:
        """Read a result that `has` has confirmed.

        Args:
            name: Name of the result.
        """
        tensors = safetensors.torch.load_file(self.path / f"{name}.safetensors")
        return Artefact(tensors=tensors, stats=self.stats(name))

    def stats(self, name: str) -> dict[str, Any]:
        """Read what was measured while a result was made, without its tensors.

        Args:
            name: Name of the result.
        """
        record = self._record(name)
        assert record is not None, name
        return dict(record["stats"])

    def log(self, event: str, **fields: Any) -> None:
        """Append an event to events.jsonl, with the time (UTC).

        Args:
            event: What happened: "run", "block", "assemble".
            **fields: Plain data.
        """
        record = {"event": event, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields}
        with (self.path / _EVENTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, sort_keys=True, allow_nan=False) + "\n")

    def events(self) -> list[dict[str, Any]]:
        """Return the events of this run and of the interrupted ones before it, in order."""
        path = self.path / _EVENTS
        found = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            with contextlib.suppress(ValueError):  # a line cut short by a kill
                found.append(json.loads(line))
        return found

    def clear(self) -> None:
        """Remove everything but the lock."""
        for path in self.path.iterdir():
            if path.name != _LOCK:
                path.unlink()

    def remove(self) -> None:
        """Remove the folder; the lock goes last, so that no other run enters meanwhile."""
        self.clear()
        (self.path / _LOCK).unlink()
        self.path.rmdir()

    def _record(self, name: str) -> dict[str, Any] | None:
        try:
            record = json.loads((self.path / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) else None


@contextlib.contextmanager
def open_run_folder(out: Path) -> Iterator[RunFolder]:
    """Create or reopen the run folder of an output and hold its lock.

    Leftovers of killed runs beside the output (half-written checkpoints) are removed.

    Args:
        out: The output that the run will write.

    Yields:
        The folder.

    Raises:
        BusyError: If another process has it.
        InvalidInputError: If it cannot be created.
    """
    out = Path(os.path.abspath(out))
    path = out.parent / f".{out.name}.s2q-run"
    try:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(path, out)
    except OSError as error:
        raise InvalidInputError(f"{out} cannot be written: {error.strerror or error}; check the folder") from error
    try:
        _remove_leftovers(out)
        folder = RunFolder(path)
        try:
            yield folder
        except BaseException:
            if not any(path.glob("*.safetensors")):  # nothing to go on from
                folder.remove()
            raise
    finally:
        os.close(descriptor)


def _remove_leftovers(out: Path) -> None:
    kinds = ["partial", "old"] if out.exists() else ["partial"]  # without `out`, an old one is the only copy
    for kind in kinds:
        for left in out.parent.glob(f".{glob.escape(out.name)}.{kind}-*"):
            shutil.rmtree(left, ignore_errors=True)


def _lock(path: Path, out: Path) -> int:
    """Take the lock; its file may be removed by the run that ends just now, hence the second look."""
    while True:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(descriptor).st_ino == (path / _LOCK).stat().st_ino:
                    return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise BusyError(f"{out} is being written by another run; wait for it, or choose another output") from error
        os.close(descriptor)
