"""Tables of exported checkpoints: beside the reading program's own quantization, and as ComfyUI computes them.

    python benchmarks/exports.py -m MODEL [--to comfyui]
    python benchmarks/comfyui.py COMFYUI_FOLDER --python INTERPRETER

Evaluations are in ``results/exports/MODEL``, outputs of ComfyUI in ``results/exports/comfyui.json``.
"""

import json
from pathlib import Path
from typing import Any

from markdown_tables import interval, mean_by_prompt, table_head, table_row

from s2q.evaluation.paired import paired_differences
from s2q.shapes.embedded import EMBEDDED_NAMES

RESULTS = Path(__file__).parent / "results" / "exports"
NAMES = {"wan": "Wan", "ltx": "LTX-Video", "hunyuanvideo": "HunyuanVideo"}
PROGRAMS = {"ComfyUI": "comfyui", "comfy-kitchen": "comfy-kitchen", "PyTorch": "torch"}
TOOLS = {"sdnq-w4a8": ("sdnq", "SDNQ", ""), "comfy-w4a8": ("comfy-kitchen", "comfy-kitchen", "comfyui")}
"""By peer: package, name, and folder of the records."""
_ERROR = "velocity_relative_error"


def exports_table(peer: str) -> str:
    """Exported recipes of each embedded model, with paired ratios to a peer."""
    package, tool, folder = TOOLS[peer]
    lines = table_head("model", ["quantized by", "storage", "velocity error, %", f"ratio to {tool}", "PSNR dB"])
    samples, commands = set(), set()
    for model in EMBEDDED_NAMES:
        records = {
            path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / model / folder).glob("*.json"))
        }
        for name in sorted(records, key=lambda name: (name != peer, name)):
            record = records[name]
            base = records[peer] if name != peer else None
            label = f"{tool} {record['versions'][package]}" if base is None else f"`{name}`"
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


def comfyui_table(_: str) -> str:
    """Exports as ComfyUI detects and computes them; distances of outputs in %."""
    record = json.loads((RESULTS / "comfyui.json").read_text())
    distances = ["ComfyUI to s2q, %", "ComfyUI to full precision, %", "s2q to full precision, %"]
    lines = table_head("transformer", ["recipe", "detected as", "quantized linears", *distances])
    for model, rows in record["models"].items():
        for recipe, row in rows.items():
            counts = ", ".join(f"{count} `{name}`" for name, count in row["linears"].items())
            names = ("comfyui_to_s2q", "comfyui_to_full_precision", "s2q_to_full_precision")
            errors = [format(100 * row[name], "#.2g") for name in names]
            builtin, *overrides = recipe.split(" ")
            label = " ".join([f"`{builtin}`", *(["with `fp8_table`"] if overrides else [])])
            lines.append(table_row(NAMES[model], [label, f"`{row['detected']}`", counts, *errors]))
    versions = ", ".join(f"{name} {record['versions'][key]}" for name, key in PROGRAMS.items())
    return "\n".join([*lines, "", f"{versions}, on a CPU. Made by `{record['command']}`."])
