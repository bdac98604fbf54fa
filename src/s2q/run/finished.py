"""A run that was killed after its checkpoint was in place and before its run folder was removed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2q.checkpoint import check_intact
from s2q.checkpoint.save import EVENTS
from s2q.common.outputs import lock_folder
from s2q.common.records import REPORT
from s2q.common.run_folder import open_run_folder, read_events
from s2q.common.versions import package_versions
from s2q.generation.prompts import prompt_record
from s2q.models import ModelSource
from s2q.models.lora import effect_of
from s2q.recipes.schema import Recipe
from s2q.run.report import QuantizationReport


def run_inputs(
    model: ModelSource | str, recipe: Recipe, prompts: Sequence[str] | None, options: Mapping[str, str]
) -> dict[str, Any]:
    """Return everything that a checkpoint depends on, by its name in messages.

    Files of the model count by size and time of change; of a loaded pipeline, only the name of the model is known.
    """
    described: dict[str, Any] = {"model": model}
    if not isinstance(model, str):
        files = {path: path.stat() for path in sorted(model.folder.rglob("*")) if path.is_file()}
        described = {
            "model": [model.name, model.kind, str(model.folder.resolve())],
            "loras": effect_of(lora.to_dict() for lora in model.loras),
            "model files": {
                path.relative_to(model.folder).as_posix(): f"{stat.st_size} bytes of time {stat.st_mtime_ns}"
                for path, stat in files.items()
            },
        }
    given = None if prompts is None else list(map(prompt_record, prompts))
    return {**described, "recipe": recipe.resolved(), "prompts": given, **options, **package_versions()}


def finished_report(out: Path, request: str) -> QuantizationReport | None:
    """Return the report of a killed run that had finished the same request (the fingerprint of its `run_inputs`).

    Its run folder is removed.
    """
    if not (out.is_dir() and lock_folder(out).is_dir()):
        return None
    with open_run_folder(out) as folder:
        requests = [event.get("request") for event in read_events(out / EVENTS) if event.get("event") == "run"]
        if requests[-1:] != [request]:
            return None
        check_intact(out, verify=True)
        folder.clear()
    return QuantizationReport.from_dict(json.loads((out / REPORT).read_text(encoding="utf-8")))
