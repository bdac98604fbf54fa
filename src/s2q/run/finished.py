"""A run that was killed after its checkpoint was in place and before its run folder was removed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from s2q.checkpoint import check_intact
from s2q.checkpoint.save import EVENTS, REPORT
from s2q.common.fingerprint import fingerprint
from s2q.common.outputs import lock_folder
from s2q.common.run_folder import open_run_folder, read_events
from s2q.common.versions import package_versions
from s2q.models import ModelSource
from s2q.recipes.schema import Recipe
from s2q.run.report import QuantizationReport


def request_hash(source: ModelSource, recipe: Recipe, prompts: Sequence[str] | None, options: Mapping[str, str]) -> str:
    """Return a hash of everything that a checkpoint depends on; files of the model count by size and time of change."""
    files = {path: path.stat() for path in sorted(source.folder.rglob("*")) if path.is_file()}
    content = {
        "model": [source.name, source.kind, str(source.folder.resolve())],
        "files": [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in files.items()],
        "recipe": recipe.resolved(),
        "prompts": None if prompts is None else list(prompts),
        "options": dict(options),
        "versions": package_versions(),
    }
    return fingerprint(content)


def finished_report(out: Path, request: str) -> QuantizationReport | None:
    """Return the report of a killed run that had finished the same request (`request_hash`); remove its run folder."""
    if not (out.is_dir() and lock_folder(out).is_dir()):
        return None
    with open_run_folder(out) as folder:
        requests = [event.get("request") for event in read_events(out / EVENTS) if event.get("event") == "run"]
        if requests[-1:] != [request]:
            return None
        check_intact(out, verify=True)
        folder.clear()
    return QuantizationReport.from_dict(json.loads((out / REPORT).read_text(encoding="utf-8")))
