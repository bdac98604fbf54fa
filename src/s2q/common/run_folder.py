"""The folder in which a run keeps what it has finished, for a killed run to resume from.

It is the folder of the output's lock, `.{name}.s2q-run` (`s2q.common.outputs`): the results of the blocks, each with
the fingerprint of its inputs and the SHA-256 of its file, the inputs of the run, and the events. It goes when the
checkpoint is in place.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from s2q.common.differences import differences
from s2q.common.files import atomic_write_bytes, atomic_write_json, canonical_json, sha256_file
from s2q.common.interrupts import finish_first
from s2q.common.outputs import LOCK, OutputLock, lock_folder, output_lock

_EVENTS = "events.jsonl"
_INPUTS = "inputs.json"


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """A finished result: tensors by name, on the CPU, and what was measured while it was made, plain data."""

    tensors: Mapping[str, Tensor]
    stats: Mapping[str, Any]


class ArtefactFolder:
    """Finished results in the run folder of one output, for whichever process of the run reads or writes them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def has(self, name: str, fingerprint: str) -> bool:
        """Tell whether a result ("block-003") is there, was made from the same inputs, and is intact."""
        record = self._record(name)
        if record is None or record.get("fingerprint") != fingerprint:
            return False
        path = self.path / f"{name}.safetensors"
        return path.is_file() and sha256_file(path) == record.get("sha256")

    def save(self, name: str, fingerprint: str, artefact: Artefact) -> None:
        """Store a result atomically, with a hash of everything that it depends on."""
        path = self.path / f"{name}.safetensors"
        content = safetensors.torch.save({key: tensor.contiguous() for key, tensor in artefact.tensors.items()})
        with finish_first():
            (self.path / f"{name}.json").unlink(missing_ok=True)
            atomic_write_bytes(path, content)
            record = {"fingerprint": fingerprint, "sha256": sha256_file(path), "stats": dict(artefact.stats)}
            atomic_write_json(self.path / f"{name}.json", record)

    def load(self, name: str) -> Artefact:
        """Read a result that `has` has confirmed."""
        tensors = safetensors.torch.load_file(self.path / f"{name}.safetensors")
        return Artefact(tensors=tensors, stats=self.stats(name))

    def stats(self, name: str) -> dict[str, Any]:
        """Read what was measured while a result was made, without its tensors."""
        record = self._record(name)
        assert record is not None, name
        return dict(record["stats"])

    def _record(self, name: str) -> dict[str, Any] | None:
        return _read(self.path / f"{name}.json")


class RunFolder(ArtefactFolder):
    """The run folder of one output, locked by this process; get one through `open_run_folder`."""

    def __init__(self, lock: OutputLock) -> None:
        super().__init__(lock.folder)
        self.lock = lock

    def log(self, event: str, **fields: Any) -> None:
        """Append an event ("run", "block", "assemble") to events.jsonl, with the time (UTC) and plain data."""
        record = {"event": event, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields}
        with (self.path / _EVENTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, sort_keys=True, allow_nan=False) + "\n")

    def replace_inputs(self, inputs: Mapping[str, Any]) -> list[str]:
        """Store what the results of a run depend on; return how it differs from what an interrupted run stored."""
        path = self.path / _INPUTS
        before = _read(path)
        atomic_write_json(path, dict(inputs))
        return [] if before is None else list(differences(before, json.loads(canonical_json(dict(inputs)))))

    def events(self) -> list[dict[str, Any]]:
        """Return the events of this run and of the interrupted ones before it, in order."""
        return read_events(self.path / _EVENTS)

    def clear(self) -> None:
        """Remove everything except the lock, with which the folder goes."""
        for path in self.path.iterdir():
            if path.name != LOCK:
                path.unlink()


def _read(path: Path) -> dict[str, Any] | None:
    """Return a record; None if it is not there or damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events of an events.jsonl in order; none if there is no such file."""
    events = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        with contextlib.suppress(ValueError):  # a line cut short by a kill
            events.append(json.loads(line))
    return [event for event in events if isinstance(event, dict)]


@contextlib.contextmanager
def open_run_folder(out: Path) -> Iterator[RunFolder]:
    """Create or reopen the run folder of an output and hold its lock; spilled tensors of a killed run are removed."""
    with output_lock(out) as lock:
        folder = RunFolder(lock)
        for path in folder.path.glob("*.safetensors"):
            if not path.with_suffix(".json").exists():  # no artefact
                path.unlink()
        try:
            yield folder
        except BaseException:
            if not any(folder.path.glob("*.safetensors")):  # nothing to resume from
                folder.clear()
            raise


def remove_run_folder(out: Path) -> None:
    """Remove the run folder of an output that is finished; BusyError if a run is at work in it."""
    if lock_folder(out).is_dir():
        with open_run_folder(out) as folder:
            folder.clear()
