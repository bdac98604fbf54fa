"""The table of other tools beside the recipes of this package, width by width, on an embedded model.

    python benchmarks/peers.py -m MODEL

Evaluations are in ``results/peers/MODEL``; each width is compared on the prompts and seeds that all of it have.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from markdown_tables import interval, mean_by_prompt, table_head, table_row
from methods import mean_error, with_shared_videos

from s2q.evaluation.paired import paired_differences
from s2q.recipes.methods import is_rival

RESULTS = Path(__file__).parent / "results"
_WIDTHS = ("w8a8", "w8a16", "w4a16", "w4a8", "w4a4")


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
    samples, commands = set(), set()
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
    return "\n".join([*lines, "", f"{sample}, float32, block linears. Made by {made_by}."])


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
            f"{record['storage']['ratio']:.2f}×",
            f"{record['quantize_seconds']:.3g} s",
            interval(error, "#.3g", scale=100.0),
            times,
            interval(psnr, ".1f"),
        ],
    )
