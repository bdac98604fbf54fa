"""The tables of all methods at one width each, and of a method with parts of S²Q-VDiT's, of an embedded model.

    python benchmarks/embedded_quality.py -m MODEL --into methods --prompts 32 -r RECIPE ...

Evaluations are in ``results/methods/MODEL``; those of `s2q-*` and `rtn-*`, which have more prompts, are in
``results/quality/MODEL``. Recipes of a bit width are compared on the prompts and seeds that all of them have.
"""

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from markdown_tables import interval, mean_by_prompt, table_head, table_row

from s2q.evaluation.definitions import directions
from s2q.evaluation.paired import PairedDifference, paired_differences
from s2q.planning import plan
from s2q.recipes.load import load_recipe, recipe_names

RESULTS = Path(__file__).parent / "results"
WIDTHS = ("w4a4", "w4a6", "w4a8", "w8a8")
SHOWN = {"velocity_relative_error": ("#.3g", 100.0), "psnr_frame_mean_db": (".1f", 1.0), "adherence_all": (".3f", 1.0)}
FIELD_MODELS = ("shapes-cogvideox", "shapes-wan", "shapes-cogvideox-outliers", "shapes-wan-outliers")
HEAD = ("velocity error, %", "PSNR dB", "adherence")


def methods_table(model: str) -> str:
    """Methods of each width, best first, and where one of them is clearly the best."""
    parts = [part for width in WIDTHS if (part := _width_table(width, _evaluations(model, width)))]
    return "\n\n".join(parts)


def field_table(width: str) -> str:
    """Velocity error of each method at one width, model by model; the first model's order.

    Args:
        width: One of `WIDTHS`.
    """
    by_model = {model: _shared(model, width) for model in FIELD_MODELS}
    errors = {
        model: {name: mean_error(evaluation) for name, evaluation in evaluations.items()}
        for model, evaluations in by_model.items()
    }
    names = sorted(errors[FIELD_MODELS[0]], key=errors[FIELD_MODELS[0]].__getitem__)
    lines = table_head(f"W{width[1]}A{width[3]}, velocity error, %", [f"`{model}`" for model in FIELD_MODELS])
    for name in names:
        cells = [format(100 * errors[model][name], "#.3g").rstrip(".") for model in FIELD_MODELS]
        best = [min(errors[model], key=errors[model].__getitem__) == name for model in FIELD_MODELS]
        cells = [f"**{cell}**" if first else cell for cell, first in zip(cells, best, strict=True)]
        lines.append(table_row(f"`{name}`{_mark(name)}", cells))
    return "\n".join([*lines, "", _sample(by_model[FIELD_MODELS[0]][names[0]])])


def mean_error(evaluation: Mapping[str, Any]) -> float:
    """Return the mean velocity error over the videos of an evaluation."""
    return fmean(video["metrics"]["velocity_relative_error"] for video in evaluation["videos"])


def measured_errors() -> dict[str, dict[str, float]]:
    """Mean velocity error of each recipe by embedded model, to three digits: `s2q/planning/measured.yaml`."""
    errors: dict[str, dict[str, float]] = {}
    for model in FIELD_MODELS:
        for width in WIDTHS:
            for name, evaluation in _shared(model, width).items():
                errors.setdefault(name, {})[model] = float(f"{mean_error(evaluation):.3g}")
    return {name: errors[name] for name in sorted(errors) if name in recipe_names()}


def _mark(name: str) -> str:
    return ", simulated" if load_recipe(name).linear_scheme().simulated else ""


def _evaluations(model: str, width: str) -> dict[str, dict[str, Any]]:
    """Evaluations by recipe, their means those of the videos that all have."""
    return {name: _with_means(evaluation) for name, evaluation in _shared(model, width).items()}


def _shared(model: str, width: str) -> dict[str, dict[str, Any]]:
    """Evaluations by recipe, their videos those that all have."""
    if not any((RESULTS / "methods" / model).glob(f"*-{width}.json")):
        return {}
    evaluations = {}
    for folder in ("quality", "methods"):
        for path in sorted((RESULTS / folder / model).glob(f"*-{width}.json")):
            evaluations.setdefault(path.stem, json.loads(path.read_text()))
    return with_shared_videos(evaluations)


def with_shared_videos(evaluations: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return evaluations with the videos, by prompt and seed, that all of them have."""
    if not evaluations:
        return {}
    shared = set.intersection(
        *({(video["prompt"], video["seed"]) for video in record["videos"]} for record in evaluations.values())
    )
    return {
        name: record | {"videos": [video for video in record["videos"] if (video["prompt"], video["seed"]) in shared]}
        for name, record in evaluations.items()
    }


def _with_means(evaluation: dict[str, Any]) -> dict[str, Any]:
    means = dict(evaluation["metrics"])
    for name in SHOWN:
        estimate = mean_by_prompt(evaluation["videos"], name)
        if estimate is not None:
            means[name] = means[name] | estimate
    return evaluation | {"metrics": means}


def times_smaller(record: dict[str, Any]) -> str:
    """Storage that a recipe takes today, whatever the format when it was measured; a tool's is that of its files."""
    model = record["reference"].removesuffix("-outliers")  # of the same dimensions
    ratio = record["storage"]["ratio"] if "width" in record else _planned_ratio(model, record["model"])
    return f"{ratio:.2f}×"


@cache
def _planned_ratio(model: str, recipe: str) -> float:
    name, *overrides = recipe.split(" --set ")
    return float(plan(model, recipe=name, overrides=overrides).storage["ratio"])


def _width_table(width: str, evaluations: dict[str, dict[str, Any]]) -> str:
    if len(evaluations) < 2:
        return ""
    ranking = sorted(evaluations, key=lambda name: _mean(evaluations[name], "velocity_relative_error"))
    best = ranking[0]

    @cache
    def against(first: str, other: str) -> Mapping[str, PairedDifference]:
        return paired_differences(evaluations[first]["videos"], evaluations[other]["videos"])

    head = ["storage", HEAD[0], "ratio to best", *HEAD[1:]]
    lines = table_head(f"W{width[1]}A{width[3]}", head)
    for name in ranking:
        cells = _cells(evaluations[name])
        times = "" if name == best else _times(against(best, name)["velocity_relative_error"])
        storage = times_smaller(evaluations[name])
        lines.append(table_row(f"`{name}`{_mark(name)}", [storage, cells[0], times, *cells[1:]]))
    lines += ["", f"{_sample(evaluations[best])} {_verdict(evaluations, against)}"]
    return "\n".join(lines)


def parts_added_table(model: str) -> str:
    """Methods with salient samples, sparse token distillation or both, each beside itself without (table 8)."""
    lines = table_head("", [HEAD[0], "ratio to base method", *HEAD[1:]])
    folder = RESULTS / "methods" / model
    for base in sorted({path.stem.partition("+")[0] for path in folder.glob("*+*.json")}):
        names = (base, *(f"{base}+{parts}" for parts in ("sds", "std", "sds+std")))
        records = {name: json.loads(path.read_text()) for name in names if (path := folder / f"{name}.json").exists()}
        for name, record in records.items():
            cells = _cells(record)
            change = paired_differences(record["videos"], records[base]["videos"])["velocity_relative_error"]
            times = "" if name == base else f"{change.estimate:.2f} [{change.low:.2f}, {change.high:.2f}]"
            lines.append(table_row(f"`{name}`", [cells[0], times, *cells[1:]]))
    return "\n".join([*lines, "", _sample(record)])


def _cells(evaluation: dict[str, Any]) -> list[str]:
    return [interval(evaluation["metrics"][name], form, scale=scale) for name, (form, scale) in SHOWN.items()]


def _sample(evaluation: dict[str, Any]) -> str:
    prompts = {video["prompt"] for video in evaluation["videos"]}
    seeds = {video["seed"] for video in evaluation["videos"]}
    return f"{len(prompts)} prompts × {len(seeds)} seeds."


def _times(error: PairedDifference) -> str:
    """How much larger a velocity error is than that of the best, paired by prompt."""
    low, high, estimate = (1 / end for end in (error.high, error.low, error.estimate))
    return f"{estimate:.2f} [{low:.2f}, {high:.2f}]"


def _verdict(
    evaluations: Mapping[str, dict[str, Any]], against: Callable[[str, str], Mapping[str, PairedDifference]]
) -> str:
    """Say who wins, by the rule of `s2q compare`: whoever is clearly better than every other."""
    said = []
    for metric, title in (("velocity_relative_error", "Velocity error"), ("psnr_frame_mean_db", "PSNR")):
        choose, larger = (max, "a") if directions()[metric] else (min, "b")
        best = choose(evaluations, key=lambda name, metric=metric: _mean(evaluations[name], metric))
        tied = [name for name in evaluations if name != best and against(best, name)[metric].larger() != larger]
        if tied:
            said.append(f"{title}: `{best}` is tied with {', '.join(f'`{name}`' for name in tied)}.")
        else:
            said.append(f"{title}: `{best}` beats every other.")
    return " ".join(said)


def _mean(evaluation: Mapping[str, Any], metric: str) -> float:
    return float(evaluation["metrics"][metric]["mean"])
