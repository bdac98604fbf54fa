"""The table of exported checkpoints beside what the reading program's own quantization gives.

    python benchmarks/exports.py -m MODEL

Evaluations are in ``results/exports/MODEL``.
"""

import json
from pathlib import Path
from typing import Any

from markdown_tables import interval, mean_by_prompt, table_head, table_row

from s2q.evaluation.paired import paired_differences
from s2q.shapes.embedded import EMBEDDED_NAMES

RESULTS = Path(__file__).parent / "results" / "exports"
_ERROR = "velocity_relative_error"


def exports_table(peer: str) -> str:
    """Exported recipes of each embedded model, with paired ratios to a peer."""
    lines = table_head("model", ["quantized by", "storage", "velocity error, %", "ratio to SDNQ", "PSNR dB"])
    samples, commands = set(), set()
    for model in EMBEDDED_NAMES:
        records = {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / model).glob("*.json"))}
        for name in sorted(records, key=lambda name: (name != peer, name)):
            record = records[name]
            base = records[peer] if name != peer else None
            label = f"SDNQ {record['versions']['sdnq']}" if base is None else f"`{name}`"
            lines.append(table_row(f"`{model}`", [label, *_cells(record, base)]))
            samples.add((record["n_prompts"], record["n_seeds"]))
            commands.add(record["command"])
    sample = ", ".join(f"{prompts} prompts × {seeds} seed{'s' * (seeds > 1)}" for prompts, seeds in sorted(samples))
    made_by = ", ".join(f"`{command}`" for command in sorted(commands))
    return "\n".join([*lines, "", f"{sample}, float32. Made by {made_by}."])


def _cells(record: dict[str, Any], base: dict[str, Any] | None) -> list[str]:
    ratio = ""
    if base is not None:
        change = paired_differences(record["videos"], base["videos"])[_ERROR]
        ratio = interval({"mean": change.estimate, "low": change.low, "high": change.high}, "#.2g")
    error, psnr = (mean_by_prompt(record["videos"], metric) or {} for metric in (_ERROR, "psnr_frame_mean_db"))
    return [
        f"{record['storage']['ratio']:.2f}×",
        interval(error, "#.3g", scale=100.0),
        ratio,
        interval(psnr, ".1f"),
    ]
