"""From what is in the folder to `compare.json`: metrics of every entry, rankings, winners, paired differences."""

import math
from collections.abc import Mapping
from typing import Any

from s2q.common.errors import S2QError
from s2q.common.files import atomic_write_json
from s2q.common.progress import Progress, StageCounter
from s2q.common.records import COMPARISON_VERSION
from s2q.comparison.entries import Entry
from s2q.comparison.folder import CompareFolder
from s2q.comparison.setup import SHARD_PROMPTS, RunPlan, Setup
from s2q.evaluation.definitions import REFERENCE, directions, statistics_definitions
from s2q.evaluation.intervals import INTERVAL, MIN_PROMPTS
from s2q.evaluation.paired import compare_group
from s2q.evaluation.scores import merge
from s2q.evaluation.summary import summarise, versions
from s2q.generation.defaults import checkpoint_record, frame_rate_of, quantization_report
from s2q.generation.prompts import prompt_record
from s2q.models import resolve_model


def build_result(
    folder: CompareFolder, plan: RunPlan, setup: Setup, failures: Mapping[str, str], *, progress: Progress
) -> dict[str, Any]:
    """Return the content of `compare.json`; also write the `eval.json` of every entry that has not failed."""
    evaluations = {
        entry.label: _evaluation(folder, plan, entry.label) for entry in setup.entries if entry.label not in failures
    }
    described = {entry.label: _entry(folder, plan, setup, entry) for entry in setup.entries}
    for label, evaluation in evaluations.items():
        described[label]["metrics"] = evaluation["metrics"]
        described[label]["evaluation"] = folder.evaluation(label).relative_to(folder.path).as_posix()
    for label, why in failures.items():
        described[label]["error"] = why
    any_evaluation = next(iter(evaluations.values()), None)
    metrics = {} if any_evaluation is None else any_evaluation["metrics"]
    few = f"too few prompts for statistics ({len(plan.prompts)}): no intervals, no p-values and no winner below"
    return {
        "schema_version": COMPARISON_VERSION,
        "model": plan.model,
        "n_prompts": len(plan.prompts),
        "n_seeds": len(plan.seeds),
        "prompts": list(plan.prompts),
        "inputs": list(map(prompt_record, plan.prompts)),
        "calibration": {
            "prompts": "the model's own" if plan.calibration_prompts is None else list(plan.calibration_prompts),
            "seed": plan.seed,
            "definition": "every recipe that calibrates takes its first n_prompts of these, with this seed",
        },
        "entries": list(described.values()),
        "groups": _groups(setup, evaluations, progress),
        "reference_metrics": {
            name.removeprefix(REFERENCE): entry for name, entry in metrics.items() if name.startswith(REFERENCE)
        },
        "noise_floor": None if any_evaluation is None else any_evaluation["noise_floor"],
        "warning": None if len(plan.prompts) >= MIN_PROMPTS else f"{few} {MIN_PROMPTS}",
        "settings": {
            **plan.settings,
            "seeds": list(plan.seeds),
            "dtype": None if any_evaluation is None else any_evaluation["settings"]["dtype"],
            "device": plan.device,
            "shard_prompts": SHARD_PROMPTS,
            "frame_rate": frame_rate_of(setup.source),
            "interval": INTERVAL,
        },
        "definitions": statistics_definitions(),
        "higher_is_better": {name: directions().get(name) for name in plan.metrics},
        "versions": versions(),
    }


def _groups(setup: Setup, evaluations: Mapping[str, dict[str, Any]], progress: Progress) -> list[dict[str, Any]]:
    """Results of each evaluated bit width, the widest first."""
    widths: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in setup.entries:
        if entry.label in evaluations:
            widths.setdefault(entry.width, {})[entry.label] = evaluations[entry.label]
    total = sum(math.comb(len(members), 2) for members in widths.values())
    pair_done = StageCounter(progress, "rank", total) if total else lambda: None
    return [
        {"width": width, **compare_group(widths[width], pair_done=pair_done)} for width in sorted(widths, key=_by_bits)
    ]


def entry_plan(setup: Setup, entry: Entry) -> dict[str, Any]:
    """Return what is known of an entry before any compute."""
    return {
        "label": entry.label,
        "recipe": None if entry.recipe is None else entry.recipe.name,
        "checkpoint": None if entry.source is None else entry.given,
        "peer": None if entry.peer is None else entry.peer.name,
        "description": entry.description,
        "overrides": list(entry.overrides),
        "width": entry.width,
        "storage": _storage(setup, entry),
        "error": setup.obstacles.get(entry.label),
    }


def _storage(setup: Setup, entry: Entry) -> dict[str, Any] | None:
    """The bytes of a checkpoint's transformers as they are stored, whoever made it; those that a recipe will take."""
    if entry.source is not None:
        return entry.source.storage()
    planned = setup.planned.get(entry.label)
    return None if planned is None else dict(planned.storage)


def _entry(folder: CompareFolder, plan: RunPlan, setup: Setup, entry: Entry) -> dict[str, Any]:
    described = entry_plan(setup, entry)
    described |= {"simulated": False, "seconds": None, "calibration": None, "metrics": {}, "evaluation": None}
    if entry.label in setup.obstacles:
        return described
    if entry.peer is not None:
        cost = folder.load_cost(entry.label, entry.identity()) or {}
        return described | {name: cost.get(name) for name in ("seconds", "storage")}
    source = entry.source
    if source is None and folder.checkpoint(entry.label).is_dir():
        source = resolve_model(folder.checkpoint(entry.label))
    record = {} if source is None else checkpoint_record(source.folder)
    described["simulated"] = bool(record.get("simulated", False))
    if record:
        described["storage"] = record["storage"]
    if source is not None and (report := quantization_report(source.folder)):
        selection = report.get("selection") or {}
        described["seconds"] = report["seconds"] + sum(
            block["seconds"] for block in report["blocks"] if block["resumed"]
        )
        described["calibration"] = {"n_prompts": report["n_prompts"], "samples": selection.get("samples")}
    return described


def _evaluation(folder: CompareFolder, plan: RunPlan, label: str) -> dict[str, Any]:
    parts = [folder.load_shard(plan, label, index) for index in range(len(plan.shards()))]
    if None in parts:
        raise S2QError(
            f"{folder.evaluation(label).parent}: part {parts.index(None)} of the evaluation is missing; run the same "
            "command again"
        )
    evaluation = summarise(merge([part for part in parts if part is not None]))
    atomic_write_json(folder.evaluation(label), evaluation)
    return evaluation


def _by_bits(width: str) -> tuple[bool, tuple[int, ...], str]:
    """The most bits first, what has no bits last."""
    weights, separator, activations = width.removeprefix("w").partition("a")
    if not (separator and weights.isdigit() and activations.isdigit()):
        return (True, (), width)
    return (False, (-int(weights), -int(activations)), width)
