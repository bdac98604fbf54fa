"""`bench.json`: results, written at once, and read to resume an interrupted run.

A file belongs to one machine and one set of versions. A result is known by `IDENTITY`; one that is there already is not
measured again.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2q.common.errors import InvalidInputError
from s2q.common.files import atomic_write_json
from s2q.common.records import BENCH_VERSION

IDENTITY = ("op", "scheme", "recipe", "backend", "shape", "model", "tokens", "blocks", "attention", "readers")
"""The fields of a result that say what was measured; null where they do not apply."""

_REMEDY = "name another file, or pass --again to start it anew"


def identity(**fields: Any) -> dict[str, Any]:
    """Return the fields of `IDENTITY`, those not given being None."""
    assert set(fields) <= set(IDENTITY), fields
    return {name: fields.get(name) for name in IDENTITY}


def place_of(hardware: Mapping[str, Any]) -> str:
    """Return what computed, for people: the GPU, or the CPU, its instruction set and how many threads."""
    if "gpu" in hardware:
        return str(hardware["gpu"])
    capped = f" (capped by {hardware['limited_by']})" if hardware.get("limited_by") else ""
    instructions = f"{hardware['instruction_set']}{capped}, " if "instruction_set" in hardware else ""
    threads = "1 thread" if hardware["threads"] == 1 else f"{hardware['threads']} threads"
    return f"{hardware['processor']}, {instructions}{threads}"


class ResultsFile:
    """A results file; nothing is written before the first result.

    Args:
        again: Whether to measure what is there again; a file of another machine is then started anew.

    Raises:
        InvalidInputError: If the file is there and is no results file, or one of another machine or other versions.
    """

    def __init__(
        self, path: Path, *, hardware: Mapping[str, Any], versions: Mapping[str, Any], again: bool = False
    ) -> None:
        self._path = path
        self._content: dict[str, Any] = {
            "schema_version": BENCH_VERSION,
            "hardware": dict(hardware),
            "versions": dict(versions),
            "results": [],
        }
        self._done: set[str] = set()
        if path.exists():
            self._take_over(_read(path), again=again)

    @property
    def content(self) -> Mapping[str, Any]:
        """Content of the file, also before it is written."""
        return self._content

    def has(self, wanted: Mapping[str, Any]) -> bool:
        """Whether a result need not be measured."""
        return _key(wanted) in self._done

    def add(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Put results in, replacing those of the same identity, and write the file."""
        new = {_key(result): dict(result) for result in results}
        self._done |= set(new)
        kept = [result for result in self._content["results"] if _key(result) not in new]
        self._content["results"] = [*kept, *new.values()]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(self._path, self._content)

    def _take_over(self, content: Mapping[str, Any], *, again: bool) -> None:
        differences = [
            f"{name} {content[group].get(name)!r} there, {value!r} here"
            for group in ("hardware", "versions")
            for name, value in self._content[group].items()
            if content[group].get(name) != value
        ]
        if differences and again:
            return
        if differences:
            more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
            raise InvalidInputError(
                f"{self._path} was measured on another machine or with other versions: {differences[0]}{more}; "
                f"{_REMEDY}"
            )
        self._content["results"] = list(content["results"])
        if not again:
            self._done = {_key(result) for result in content["results"]}


def _key(entry: Mapping[str, Any]) -> str:
    return json.dumps([entry.get(name) for name in IDENTITY])


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path} cannot be read as JSON and is not overwritten; choose another file") from error
    wanted: dict[str, type] = {"hardware": dict, "versions": dict, "results": list}
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != BENCH_VERSION or not all(isinstance(content.get(name), kind) for name, kind in wanted.items()):
        raise InvalidInputError(
            f"{path} was not written by `s2q bench` with schema_version {BENCH_VERSION}; choose another file"
        )
    return content
