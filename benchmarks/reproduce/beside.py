"""Our figures beside the paper's: a JSON file and a page, made anew from whatever has been measured."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from markdown_tables import interval, mean_by_prompt, table_head, table_row
from published import GIB, published_models, published_name

from reproduce.plan import Request, Run, runs_of
from reproduce.run import timed_model
from reproduce.specs import FULL_PRECISION, NO_RECIPE, TABLES, Row, Table
from s2q.common.files import atomic_write_json, atomic_write_text
from s2q.planning import plan

SCHEMA_VERSION = 1
NOT_RUN = "not run"
_QUALITY = {
    "velocity_relative_error": ("velocity error", ".5f"),
    "velocity_error_by_run": ("lowest and highest run", ".5f"),
    "psnr_frame_mean_db": ("PSNR dB", ".1f"),
    "ssim": ("SSIM", ".3f"),
    "latent_relative_l2": ("latent rel. L2", ".3f"),
    "adherence_all": ("prompt adherence", ".3f"),
}
_COST = {
    "storage_gb": ("storage GB", ".3f"),
    "calibration_hours": ("calibration h", ".3g"),
    "peak_memory_gb": ("calibration memory GB", ".2f"),
}
_SPEED = {
    "storage_gb": ("storage GB", ".3f"),
    "step_memory_gb": ("memory of a step GB", ".3f"),
    "step_ms": ("step ms", ".4g"),
    "times_faster": ("times faster than bf16", ".2f"),
}
_COMPARABLE = {
    "order": (
        "Not the same measure: the paper's columns are scores of its judge, ours are distances from full precision's "
        "own videos. Only the order of the methods can be compared. `s2q eval --vbench-python` gives a checkpoint the "
        "scores of the paper's judge; the videos kept here are named as VBench expects them, too."
    ),
    "ratio": (
        "Storage can be compared as it stands (the whole transformer; GB are 2³⁰ bytes, here and in the paper). Time "
        "and memory depend on the machine, so that only what quantization gains, and how they grow with the samples, "
        "can be compared; the paper's are of one A800, and its latency is of a whole video, ours of a denoising step "
        "on random weights of the same dimensions."
    ),
}


def contents(table: Table, request: Request) -> dict[str, Any]:
    """Return everything that is known of a table."""
    name = published_name(request.model)
    values = table.paper_values(name)
    measured = _speed(table, request) if table.kind == "speed" else _quality(table, request)
    rows = []
    for row in table.rows:
        ours = measured.get(_key(row), {})
        status = NO_RECIPE if row.variant and not row.runs else "measured" if ours else NOT_RUN
        theirs = dict(zip(table.paper["metrics"], values.get(row.method, ()), strict=False))
        recipe = None if row.variant is None else {"recipe": row.variant.recipe, "overrides": row.variant.overrides}
        rows.append({"method": row.method, "status": status, "variant": recipe, "ours": ours, "paper": theirs})
    keep = ("title", "comparable", "metrics", "prompts", "claims")
    return {
        "schema_version": SCHEMA_VERSION,
        "table": table.name,
        "model": request.model,
        "published_model": name,
        "paper": {key: table.paper[key] for key in keep} | {"has_figures_of_this_model": bool(values)},
        "rows": rows,
        "prompts": len(request.prompts),
        "seeds": request.seeds,
        "settings": dict(request.settings),
        "changes": list(request.changes),
        "device": request.device,
        "dtype": request.dtype,
    }


def write(table: Table, request: Request) -> str:
    """Write a table's files and return the page."""
    content = contents(table, request)
    folder = request.out / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    page = page_of(content)
    atomic_write_json(folder / f"{table.name}.json", content)
    atomic_write_text(folder / f"{table.name}.md", page)
    return page


def overview_table(_: str) -> str:
    """The tables there are: whose figures the paper has, which rows run, and which wait for a recipe."""
    lines = table_head("table", ["what is in it", "the paper's models", "rows that run", NO_RECIPE])
    for table in TABLES.values():
        models = ", ".join(published_models()[name]["title"] for name in table.paper["values"])
        running = [row.method for row in table.rows if row.runs]
        lacking = [row.method for row in table.rows if row.variant and not row.runs]
        rows = ", ".join(running) if lacking else f"all {len(running)}"
        lines.append(table_row(f"`{table.name}`", [table.paper["title"], models, rows, ", ".join(lacking)]))
    return "\n".join(lines)


def page_of(content: Mapping[str, Any]) -> str:
    """Return the `contents` of a table as a Markdown page."""
    paper = content["paper"]
    shown = _SPEED if any("step_ms" in row["ours"] for row in content["rows"]) else _QUALITY | _COST
    ours = {name: form for name, form in shown.items() if any(row["ours"].get(name) for row in content["rows"])}
    heads = [label for label, _ in ours.values()] + (["prompts"] if ours and shown is not _SPEED else [])
    theirs = paper["metrics"] if paper["has_figures_of_this_model"] else []
    lines = [f"# {paper['title']}: {content['model']}", ""]
    lines += table_head("method", ["recipe", *heads, *(f"paper: {name}" for name in theirs)])
    for row in content["rows"]:
        cells = [_recipe(row), *_own(row, ours, prompts="prompts" in heads)]
        cells += ["" if (value := row["paper"].get(name)) is None else f"{value:g}" for name in theirs]
        lines.append(table_row(row["method"], cells))
    return "\n".join([*lines, "", *_notes(content)]) + "\n"


def _own(row: Mapping[str, Any], shown: Mapping[str, tuple[str, str]], *, prompts: bool) -> list[str]:
    metrics = row["ours"]
    cells = []
    for name, (_, form) in shown.items():
        value = metrics.get(name)
        if isinstance(value, dict):
            cells.append(interval(value, form))
        elif isinstance(value, list):
            cells.append(f"{min(value):{form}}, {max(value):{form}}")
        else:
            cells.append("" if value is None else format(value, form))
    if prompts:
        cells.append(str(metrics["prompts"]) if "prompts" in metrics else "")
    if row["status"] == NOT_RUN and cells:
        cells[0] = NOT_RUN
    return cells


def _recipe(row: Mapping[str, Any]) -> str:
    if row["variant"] is None:
        return ""
    if row["status"] == NO_RECIPE:
        return NO_RECIPE
    return f"`{row['variant']['recipe']}`" + "".join(f" `{override}`" for override in row["variant"]["overrides"])


def _notes(content: Mapping[str, Any]) -> list[str]:
    paper, rows = content["paper"], content["rows"]
    notes = [_COMPARABLE[paper["comparable"]]] if paper["has_figures_of_this_model"] else []
    notes += [f"The paper: {claim}" for claim in paper["claims"]]
    if not paper["has_figures_of_this_model"]:
        names = ", ".join(published_models()[name]["title"] for name in _paper_models(content["table"]))
        notes.append(f"No figures of the paper for this model; those we have are of: {names or 'none'}.")
    lacking = [row["method"] for row in rows if row["status"] == NO_RECIPE]
    if lacking:
        notes.append(f"Not run, because the package has no recipe of theirs yet: {', '.join(lacking)}.")
    if content["changes"]:
        notes.append(
            f"Recipes changed by {', '.join(f'`{change}`' for change in content['changes'])}: not the paper's setting."
        )
    if content["settings"]:
        settings = ", ".join(f"{name} {value}" for name, value in content["settings"].items())
        notes.append(f"Videos generated with {settings.replace('_', ' ')}, everything else as the model has it.")
    if paper["prompts"]:
        notes.append(f"The paper's prompts: {paper['prompts']}")
    if any("prompts" in row["ours"] for row in rows):
        notes.append(
            f"Ours: {content['prompts']} prompts, videos of each: {content['seeds']}. Brackets: 95 % bootstrap "
            "interval over prompts, from ten prompts on."
        )
    tokens = {row["ours"]["tokens"] for row in rows if "tokens" in row["ours"]}
    if tokens:
        notes.append(f"Timed at {', '.join(map(str, sorted(tokens)))} video tokens, unchanged recipes.")
    return [part for note in notes for part in (note, "")][:-1]


def _paper_models(name: str) -> Sequence[str]:
    return list(TABLES[name].paper["values"])


def _key(row: Row) -> str:
    return FULL_PRECISION if row.variant is None else row.variant.name


def _quality(table: Table, request: Request) -> dict[str, dict[str, Any]]:
    """What was measured of each row: fidelity over all runs and pieces, and what calibration took."""
    by_row: dict[str, list[Run]] = {}
    for run in runs_of(table, request):
        by_row.setdefault(_key(run.row), []).append(run)
    rows: dict[str, dict[str, Any]] = {}
    for key, runs in by_row.items():
        by_run = [_videos(run) for run in runs]
        videos = [video for group in by_run for video in group]
        if not videos:
            continue
        means: dict[str, Any] = {name: estimate for name in _QUALITY if (estimate := mean_by_prompt(videos, name))}
        rows[key] = means | _costs(runs) | {"prompts": len({video["prompt"] for video in videos})}
        reference = mean_by_prompt(videos, "reference_adherence_all")
        if reference:
            rows.setdefault(FULL_PRECISION, {"adherence_all": reference})
        if len(runs) > 1:
            errors = [error for group in by_run if (error := mean_by_prompt(group, "velocity_relative_error"))]
            rows[key]["velocity_error_by_run"] = [error["mean"] for error in errors]
    return rows


def _videos(run: Run) -> list[dict[str, Any]]:
    records = [run.record(prompts) for prompts in run.request.pieces()]
    return [video for path in records if path.exists() for video in json.loads(path.read_text())["videos"]]


def _costs(runs: Sequence[Run]) -> dict[str, Any]:
    """Storage of the runs that are there, and time and memory of those that were not interrupted."""
    paths = [run.checkpoint / "s2q" / "report.json" for run in runs]
    reports = [json.loads(path.read_text()) for path in paths if path.exists()]
    if not reports:
        return {}
    whole = [report for report in reports if not any(block["resumed"] for block in report["blocks"])]
    costs = {"storage_gb": reports[0]["storage"]["quantized_bytes"] / GIB}
    if whole:
        costs["calibration_hours"] = sum(report["seconds"] for report in whole) / len(whole) / 3600
        costs["peak_memory_gb"] = max(report["peak_memory_bytes"] for report in whole) / GIB
    return costs


def _speed(table: Table, request: Request) -> dict[str, dict[str, Any]]:
    """What `s2q plan` says of storage, and `s2q bench` of a denoising step."""
    model = timed_model(request.model)
    path = request.out / "bench.json"
    steps = json.loads(path.read_text())["results"] if path.exists() else []
    timed = {step["recipe"]: step for step in steps if step["model"] == model and step["recipe"]}
    rows: dict[str, dict[str, Any]] = {}
    for row in table.rows:
        if row.variant is None or row.variant.recipe not in timed:
            continue
        step = timed[row.variant.recipe]
        storage = plan(model, recipe=row.variant.recipe, overrides=request.changes, dtype=request.dtype).storage
        rows[_key(row)] = {
            "storage_gb": storage["quantized_bytes"] / GIB,
            "step_memory_gb": _gib(step["peak_memory_bytes"]),
            "step_ms": step["milliseconds"],
            "times_faster": step["ratio_to_bf16"],
            "tokens": step["tokens"],
        }
        rows[FULL_PRECISION] = {
            "storage_gb": storage["full_precision_bytes"] / GIB,
            "step_memory_gb": _gib(step["bf16_peak_memory_bytes"]),
            "step_ms": step["bf16_milliseconds"],
            "times_faster": 1.0,
        }
    return rows


def _gib(value: float | None) -> float | None:
    return None if value is None else value / GIB
