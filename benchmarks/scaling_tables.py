"""Tables of simulated runs on many workers, from scaling.json."""

import json
from pathlib import Path
from typing import Any

from markdown_tables import table_head, table_row

from s2q.benchmark.results import place_of

RESULTS = Path(__file__).parent / "results"
LIMITED = ((10, "measured"), (16, "measured"), (10, "operations"), (16, "operations"))
AT = "8"
"""Workers of the table of limits."""


def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / "scaling.json").read_text())
    return content


def speedup_table(step: str) -> str:
    """Speedup of each published size and measured run by number of workers, and GPU hours relative to one GPU."""
    content = _content()
    rows = [row for row in content["models"] if row["step_is"] == step and row["prompts"] == 10]
    numbers = [number for number in rows[0]["speedup"] if number != "1"]
    lines = table_head("model", ["blocks", *(f"{number} workers" for number in numbers), "no gain beyond"])
    for row in rows:
        cells = [_cell(row["speedup"][number], int(number)) for number in numbers]
        lines.append(table_row(row["model"], [str(row["blocks"]), *cells, str(row["nothing_gained_from"])]))
    for row in content["runs"]:
        cells = [_cell(row["speedup"][number], int(number)) for number in numbers]
        blocks = sum(map(len, row["costs"]["transformers"]))
        lines.append(table_row(f"`{row['model']}`, CPU", [str(blocks), *cells, str(row["nothing_gained_from"])]))
    measured = content["step_measured_on"]
    hardware = measured["hardware"]
    lines += [
        "",
        f"`{content['recipe']}`, 10 prompts. Speedup over one worker; in brackets, device hours relative to one. "
        f"A step takes {rows[0]['step']:.1f} passes, measured on a block of `{measured['model']}`: "
        f"{place_of(hardware)}, torch {measured['versions']['torch']}. Made by `{content['command']}`.",
    ]
    return "\n".join(lines)


def _cell(speedup: float, workers: int) -> str:
    return f"{speedup:.2f} ({workers / speedup:.2f})"


def limits_table(model: str) -> str:
    """Speedup of a model on 8 workers by its prompts and the time of a step, in whole and by stage."""
    content = _content()
    head = ["a step in passes", "collect", "blocks", "whole run", "most, any number", "N/2 or more up to N ="]
    lines = table_head("prompts", head)
    for prompts, step in LIMITED:
        (row,) = (
            row for row in content["models"] if (row["model"], row["prompts"], row["step_is"]) == (model, prompts, step)
        )
        cells = [
            f"{row['step']:.1f}, {'measured' if step == 'measured' else 'by operations'}",
            *(f"{row['stages_speedup'][stage][AT]:.2f}" for stage in ("collect", "blocks")),
            f"{row['speedup'][AT]:.2f}",
            f"{row['bound']:.1f}",
            str(row["most_workers_at_half"]),
        ]
        lines.append(table_row(str(prompts), cells))
    lines += [
        "",
        f"{model} on {AT} workers. Last columns: the most that any number of workers reaches, and the largest N with a "
        f"speedup of N/2. Made by `{content['command']}`.",
    ]
    return "\n".join(lines)
