"""The table of other tools beside the recipes of this package, width by width, on an embedded model.

    python benchmarks/peers.py -m MODEL

Evaluations are in ``results/peers/MODEL``; each width is compared on the prompts and seeds that all of it have.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from markdown_tables import interval, mean_by_prompt, table_head, table_row
from methods import mean_error, times_smaller, with_shared_videos

from s2q.evaluation.paired import paired_differences
from s2q.recipes.methods import is_rival

RESULTS = Path(__file__).parent / "results"
_WIDTHS = ("w8a8", "w8a16", "w4a16", "w4a8", "w4a4")
TOOL_MODELS = ("shapes-wan", "shapes-cogvideox", "shapes-wan-outliers", "shapes-cogvideox-outliers")
_BESIDE_TOOLS = ("s2q-table-", "table-", "rtn-")
"""Recipes that the table of all tools has: those to take, and rounding to nearest."""


@cache
def records_of(model: str, width: str) -> dict[str, dict[str, Any]]:
    """Return the evaluations of recipes and peers of a width by name; those of peers have a `width`."""
    records: dict[str, dict[str, Any]] = {}
    for folder in ("quality", "methods", "peers"):
        for path in sorted((RESULTS / folder / model).glob(f"*-{width}.json")):
            records.setdefault(path.stem, json.loads(path.read_text()))
    return records


def peers_table(model: str) -> str:
    """Peers and recipes of each width, the least error first, with bytes and seconds; ratios are to the first."""
    lines = table_head("", ["made by", "storage", "quantized in", "velocity error, %", "ratio to best", "PSNR dB"])
    samples, commands, chosen_names = set(), set(), set()
    for width in _WIDTHS:
        records = records_of(model, width)
        chosen = {
            name: entry
            for name, entry in records.items()
            if "width" in entry or name.startswith("rtn-") or not is_rival(name)
        }
        if not any("width" in record for record in chosen.values()):
            continue
        shared = with_shared_videos(chosen)
        chosen_names |= shared.keys()
        ranking = sorted(shared, key=lambda name: mean_error(shared[name]))
        commands |= {record["command"] for record in chosen.values() if "width" in record}
        lines.append(table_row(f"**W{width[1]}A{width[3:]}**", [""] * 6))
        lines += [_row(name, shared[name], shared[ranking[0]]) for name in ranking]
        videos = shared[ranking[0]]["videos"]
        samples.add((len({video["prompt"] for video in videos}), len({video["seed"] for video in videos})))
    if not samples:
        return f"Not measured yet: `python benchmarks/peers.py -m {model}`."
    sample = ", ".join(f"{prompts} prompts × {seeds} seed{'s' * (seeds > 1)}" for prompts, seeds in sorted(samples))
    made_by = " and ".join(f"`{command}`" for command in sorted(commands))
    note = f"{sample}, float32, block linears."
    if any(name.startswith("s2q-export-") and not name.endswith("a16") for name in chosen_names):
        note += " `s2q-export-*` as checkpoints of s2q, which store the rotations."
    return "\n".join([*lines, "", f"{note} Made by {made_by}."])


def tools_table(weights: str) -> str:
    """Velocity error of other tools and of the recipes to take, on every model, for one width of weights, "w4".

    Storage is that on the first model, by whose error rows are ordered.
    """
    by_model = {}
    for model in TOOL_MODELS:
        records = {name: record for bits in ("a16", "a8") for name, record in records_of(model, weights + bits).items()}
        chosen = {
            name: record for name, record in records.items() if "width" in record or name.startswith(_BESIDE_TOOLS)
        }
        by_model[model] = with_shared_videos(chosen)
    first = by_model[TOOL_MODELS[0]]
    bits = f"{weights[1:]}-bit weights, velocity error, %"
    lines = table_head(bits, ["made by", "storage", *(f"`{model}`" for model in TOOL_MODELS)])
    for name in sorted(first, key=lambda name: mean_error(first[name])):
        record = first[name]
        cells = [
            format(100 * mean_error(records[name]), "#.3g").rstrip(".") if name in records else "not measured"
            for records in by_model.values()
        ]
        tool, label = record.get("does", "s2q"), record["model"] if "width" in record else f"`{name}`"
        lines.append(table_row(label, [tool, times_smaller(record), *cells]))
    videos = next(iter(first.values()))["videos"]
    prompts, seeds = (len({video[key] for video in videos}) for key in ("prompt", "seed"))
    return "\n".join([*lines, "", f"{prompts} prompts × {seeds} seeds, storage on `{TOOL_MODELS[0]}`."])


def _row(name: str, record: dict[str, Any], best: dict[str, Any]) -> str:
    metrics = ("velocity_relative_error", "psnr_frame_mean_db")
    error, psnr = (mean_by_prompt(record["videos"], metric) or {} for metric in metrics)
    times = ""
    if record is not best:
        change = paired_differences(record["videos"], best["videos"])["velocity_relative_error"]
        ends = (change.estimate, change.low, change.high)
        times = interval(dict(zip(("mean", "low", "high"), ends, strict=True)), "#.3g")
    is_peer = "width" in record
    return table_row(
        f"{record['model']}" if is_peer else f"`{name}`",
        [
            record["does"] if is_peer else "s2q",
            times_smaller(record),
            f"{record['quantize_seconds']:.3g} s",
            interval(error, "#.3g", scale=100.0),
            times,
            interval(psnr, ".1f"),
        ],
    )
