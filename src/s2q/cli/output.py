"""Results on stdout: one JSON object for programs, tables for people."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from s2q.cli.console import format_seconds
from s2q.common.device_names import is_device_name
from s2q.common.errors import printable
from s2q.common.files import canonical_json
from s2q.report.formatting import format_bytes, format_interval, format_sample, format_value, title_of

_MAX_LAYER_ROWS = 16
_PLAIN_WIDTH = 160
_ESTIMATED = (
    "Estimated, not measured: counted FLOP and bytes over the peak rates of the {source}, times assumed efficiencies; "
    "text encoder, autoencoder and files are not counted"
)


def wide_console() -> Console:
    """Return where to write a table of many columns: as wide as the terminal, and where there is none, wide enough."""
    shown = Console()
    return shown if shown.is_terminal else Console(width=_PLAIN_WIDTH)  # no line of a file or a log is broken


def new_table(first: str = "", *, left: Iterable[str] = (), right: Iterable[str] = (), fold: bool = False) -> Table:
    """Return a table without rows: its first column, then columns of text, then of numbers; `fold` breaks the first."""
    table = Table(header_style="dim", box=box.SIMPLE, pad_edge=False)
    table.add_column(first, overflow="fold" if fold else "ellipsis", no_wrap=not fold)
    for heading in left:
        table.add_column(heading, no_wrap=True)
    for heading in right:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def emit_json(content: Mapping[str, Any]) -> None:
    """Write one JSON object to stdout; it has a `schema_version`."""
    assert "schema_version" in content
    sys.stdout.write(canonical_json(dict(content)))
    sys.stdout.flush()


def show_plan(plan: Mapping[str, Any]) -> None:
    """Show a plan: totals, stages, layers grouped by kind."""
    out = wide_console()
    storage = plan["storage"]
    out.print(Text.assemble(("Plan ", "bold"), f"{plan['model']} with {plan['recipe']}"))
    out.print(_storage_line(storage))
    memory = plan["device"]["memory_bytes"]
    out.print(f"On {plan['device']['name']}{'' if memory is None else f' with {format_bytes(memory)}'}")
    stages = Table("stage", "peak memory", "time", header_style="dim", box=box.SIMPLE)
    for stage in plan["stages"]:
        memory, seconds = stage["peak_memory_bytes"], stage["seconds"]
        stages.add_row(
            stage["name"],
            format_bytes(memory) if memory is not None else "unknown",
            "unknown" if seconds is None else format_seconds(seconds),
        )
    out.print(stages)
    for line in _plan_notes(plan):
        out.print(line, soft_wrap=True)
    if (widths := plan["widths"]) is not None:
        device = plan["device"]["name"]
        out.print(
            widths_line("this device" if is_device_name(device) else device, plan["recipe"], widths), soft_wrap=True
        )
    _show_text_encoders(out, plan["text_encoders"])
    _show_layers(out, plan)


def widths_line(device: str, recipe: str, widths: Mapping[str, Any]) -> str:
    """Return a line on the widths that a device multiplies as integers, and on the recipe to take there."""
    products = widths["products"]
    integer = ", ".join(name.upper() for name in products["integer"])
    parts = [f"{integer} have integer products ({products['unit']})" if integer else "no integer products"]
    if products["fp4"]:
        parts.append("NVFP4 has products of its own (--backend fp4)")
    if widths["native"] is False:
        parts.append(f"the linears of {recipe} have no fast product")
    if (same := widths["same_cost"]) is not None:
        parts.append(same_cost_line(same, recipe))
    if (recommended := widths["recommended"]) not in (None, same):
        parts.append(f"recommended: {recommended}")
    return f"On {device}: {'; '.join(parts)}"


def same_cost_line(same: str, recipe: str) -> str:
    """Return a line on a recipe or setting with wider inputs, which cost nothing."""
    return f"{same} has the same bytes and products as {recipe}, with 8-bit inputs"


def show_recipes(comparison: Mapping[str, Any]) -> None:
    """Show recipes beside each other: size, memory, estimated time, measured errors."""
    rows = comparison["recipes"]
    models = list(dict.fromkeys(model for row in rows for model in row["velocity_relative_error"]))
    timed = next((row["estimate"] for row in rows if row.get("estimate")), None)
    headings = ["bytes", "reduction", "peak memory", *(["GPU hours", "range"] if timed else [])]
    table = new_table("recipe", right=[*headings, *(f"error, %\n{_broken(model)}" for model in models)])
    for row in rows:
        if "refused" in row:
            continue
        storage, peak, time = row["storage"], row["peak_memory_bytes"], row["estimate"]
        cells = [format_bytes(storage["quantized_bytes"]), f"{storage['ratio']:.2f}"]
        cells.append("unknown" if peak is None else format_bytes(peak))
        if timed:
            cells += (
                ["–", "–"] if time is None else [f"{time['gpu_hours']:.2f}", f"{time['low']:.2f}–{time['high']:.2f}"]
            )
        errors = (row["velocity_relative_error"].get(model) for model in models)
        table.add_row(row["recipe"], *cells, *("–" if error is None else f"{100 * error:.3g}" for error in errors))
    out = wide_console()
    out.print(table)
    out.print("error: velocity error, measured on embedded models; of another model it ranks recipes", soft_wrap=True)
    if timed:
        out.print(_ESTIMATED.format(**timed), soft_wrap=True)
    for row in rows:
        if "refused" in row:
            out.print(f"{row['recipe']} does not fit: {row['refused']}", soft_wrap=True)


def _broken(model: str) -> str:
    """The name of an embedded model in short lines, for a heading."""
    return model.removeprefix("shapes-").replace("-", "\n")


def _plan_notes(plan: Mapping[str, Any]) -> list[str]:
    """Notes on time, on the memory of calibration, and on whether it fits."""
    cost, notes = plan["calibration"], []
    if (time := plan["estimate"]) is not None:
        flop = sum(stage["flop"] or 0 for stage in plan["stages"])
        notes.append(
            f"{format_seconds(3600 * time['gpu_hours'])} on one {time['title']}, {time['gpu_hours']:.2f} GPU hours "
            f"({time['low']:.2f} to {time['high']:.2f}), for {flop:.2g} FLOP"
        )
        notes.append(_ESTIMATED.format(**time))
    if (generation := plan["generation"]) is not None:
        notes.append(_generation_line(generation))
    if cost is not None:
        where = f", {format_bytes(cost['disk_bytes'])} of it on the disk" if cost["disk_bytes"] else ""
        step = format_bytes(cost["step_bytes"]) + (", checkpointed" if cost["gradient_checkpointing"] else "")
        image = f", {cost['image_tokens']} image" if cost["image_tokens"] else ""
        notes.append(
            f"Calibration: {cost['samples']} samples, {cost['tokens']:,} video{image} and {cost['text_tokens']} text "
            f"tokens, in {cost['dtype']}; inputs and targets of a block take {format_bytes(cost['activation_bytes'])}"
            f"{where}, a step {step}"
        )
    allocation = plan["allocation"]
    if allocation is not None:
        values = ", ".join(map(str, sorted(allocation["candidates"])))
        notes.append(
            f"Allocated during the run: {allocation['what']} of {allocation['linears']} linears, each one of "
            f"{values}, within {allocation['budget']:g} bits per weight; the total is the upper bound, and each linear "
            "shows its largest candidate"
        )
    if (attention := plan["attention"]) is not None:
        share = ""
        if attention["flop"]:
            share = f", {attention['quantized_flop']:.2g} of the {attention['flop']:.2g} FLOP of attention in a call"
        notes.append(_attention_line(attention["modules"]) + share)
    return [*notes, *_fit_notes(plan)]


_OFFLOADED = {
    "none": "",
    "model": ", with one component at a time on the device (offload by model)",
    "group": ", with one block of its transformers and text encoders at a time on the device (offload by group)",
}


def _fit_notes(plan: Mapping[str, Any]) -> list[str]:
    """Whether a plan fits its device, and with which offload, or what would fit; nothing where that is not known."""
    device, there = plan["device"], plan["device"]["memory_bytes"]
    peaks = {stage["name"]: stage["peak_memory_bytes"] for stage in plan["stages"]}
    if there is None or None in peaks.values():
        return []
    for name, needed in peaks.items():
        if needed > there:
            fitting = plan["fitting_tokens"]
            remedy = "calibrate on smaller videos" if fitting is None else f"set calibration.max_tokens={fitting}"
            return [
                f"Does not fit: {name} needs {format_bytes(needed)} on {device['name']}, which has "
                f"{format_bytes(there)}; {remedy}, or use a larger device"
            ]
    return [f"Fits in {format_bytes(there)}: yes{_OFFLOADED[plan['offload'] or 'none']}"]


def _generation_line(generation: Mapping[str, Any]) -> str:
    """Settings of the calibration videos of a plan; sizes and scheduler are unknown without a pipeline."""
    parts = []
    if "num_frames" in generation:
        parts.append(f"{generation['num_frames']} frames of {generation['width']} × {generation['height']}")
    steps = f"{generation['num_inference_steps']} steps"
    if "scheduler" in generation:
        shift = generation["shift"]
        steps += f" of {generation['scheduler']}{'' if shift is None else f', shift {shift:g}'}"
    branches, scale = generation["branches"], f"{generation['guidance_scale']:g}"
    if "guidance_scale_2" in generation:
        scale += f" and {generation['guidance_scale_2']:g}"
    guided = branches == 2 or generation["guidance_scale"] > 1
    parts += [
        steps,
        f"guidance {scale} in {branches} branch{'es' if branches > 1 else ''}" if guided else "no guidance",
    ]
    if "negative_prompt" in generation:
        parts.append(f"negative prompt {printable(repr(generation['negative_prompt']))}")
    return f"Calibration videos: {', '.join(parts)}"


def show_inspection(report: Mapping[str, Any]) -> None:
    """Show the contents of a checkpoint."""
    out = wide_console()
    out.print(
        Text.assemble(
            ("Checkpoint ", "bold"),
            printable(f"{report['path']}: {report['transformer_class']}, recipe {report['recipe']}, "),
            f"format {report['format_version']}, {report['compute_dtype']}",
        ),
        soft_wrap=True,
    )
    if report["converted"]:
        tool, version, writer = (report["converted"][key] for key in ("tool", "tool_version", "writer"))
        origin = tool if version is None else f"{tool} {version}"
        out.print(
            printable(f"converted from {origin}" + ("" if writer is None else f", written by {writer}")), soft_wrap=True
        )
    if report["storage"]:
        out.print(_storage_line(report["storage"]))
    if report["layers"]:
        _show_layers(out, report)
    if report["attention"]:
        out.print(_attention_line(len(report["attention"])))
    _show_text_encoders(out, report["text_encoders"])
    if not report["files"]:
        out.print("no manifest: nothing to verify")
    elif report["verified"] is None:
        out.print(f"{len(report['files'])} files in the manifest; not verified (use --verify)")
    elif report["verified"]:
        out.print(Text(f"{len(report['files'])} files verified: every SHA-256 matches the manifest", style="green"))
    else:
        for problem in report["problems"]:
            out.print(Text(printable(problem), style="red"), soft_wrap=True)


def show_evaluation(evaluation: Mapping[str, Any], *, scheme: str | None = None) -> None:
    """Show an evaluation: metrics, intervals, noise floor, and VBench's scores with the paper's for the scheme."""
    out = wide_console()
    sample = format_sample(evaluation["n_prompts"], evaluation["n_seeds"])
    out.print(
        Text.assemble(("Evaluation ", "bold"), f"{evaluation['model']} against {evaluation['reference']}, {sample}")
    )
    out.print(metric_table(evaluation))
    if sensitivity := evaluation.get("sensitivity"):
        out.print(_sensitivity_table(sensitivity))
    if "vbench" in evaluation:
        out.print(judges_table(evaluation, scheme=scheme))
        for note in evaluation["vbench"]["notes"]:
            out.print(f"VBench: {note}", soft_wrap=True)
    for name, need in evaluation.get("evalcrafter", {}).get("absent", {}).items():
        out.print(f"EvalCrafter's {title_of(name)}: {need}", soft_wrap=True)


def _sensitivity_table(sensitivity: Mapping[str, Any]) -> Table:
    """Return a table of the kinds of linears, the one with the largest error first."""
    table = new_table("Linears quantized alone", right=("count", "velocity error", "95 % interval"))
    for kind in sensitivity["kinds"]:
        name = "velocity_relative_error"
        cells = format_value(name, kind["mean"]), format_interval(name, kind["low"], kind["high"])
        table.add_row(kind["linears"], str(kind["count"]), *cells)
    return table


def judges_table(evaluation: Mapping[str, Any], *, scheme: str | None) -> Table:
    """Return a table of VBench's and EvalCrafter's scores, the paper's beside them where it has the model."""
    from s2q.evaluation.paper import FULL_PRECISION, METHOD, published_scores

    published = published_scores(evaluation["reference"], scheme or "")
    columns = [method for method in (METHOD, FULL_PRECISION) if method in published]
    headings = ("score", "full\nprecision", *(f"paper:\n{method}" for method in columns))
    table = new_table(f"VBench {evaluation['vbench']['version']}", right=headings)
    scores = {name: entry for name, entry in evaluation.get("evalcrafter", {}).items() if name != "absent"}
    for name, entry in (evaluation["vbench"]["dimensions"] | scores).items():
        digits = ".4f" if name in scores else ".2f"
        cells = [entry["model"], entry["reference"], *(published[method].get(name) for method in columns)]
        table.add_row(title_of(name), *("–" if cell is None else f"{cell:{digits}}" for cell in cells))
    return table


def metric_table(evaluation: Mapping[str, Any], *, names: Sequence[str] = ()) -> Table:
    """Return a table of metrics."""
    floor = (evaluation["noise_floor"] or {}).get("metrics", {})
    metrics = evaluation["metrics"]
    rows = []
    for name, entry in metrics.items():
        if (names and name not in names) or name.startswith("reference_") or entry["mean"] is None:
            continue
        reference = metrics.get(f"reference_{name}", {"mean": None})["mean"]
        mean, of_reference, another = (
            format_value(name, value) for value in (entry["mean"], reference, floor.get(name))
        )
        rows.append((title_of(name), mean, format_interval(name, entry["low"], entry["high"]), of_reference, another))
    headings = ("metric", "mean", "95 %\ninterval", "full\nprecision", "another\nseed")
    kept = [column for column in range(len(headings)) if column < 2 or any(row[column] != "–" for row in rows)]
    table = new_table(headings[0], right=[headings[column] for column in kept[1:]])
    for row in rows:
        table.add_row(*(row[column] for column in kept))
    return table


def _storage_line(storage: Mapping[str, Any]) -> Text:
    before, after = (format_bytes(storage[f"{side}_bytes"]) for side in ("full_precision", "quantized"))
    return Text.assemble(
        f"Transformer: {before} in bf16, {after} quantized, ", (f"{storage['ratio']:.2f} times smaller", "bold")
    )


def _show_text_encoders(out: Console, encoders: Sequence[Mapping[str, Any]]) -> None:
    for encoder in encoders:
        before, after = (format_bytes(encoder[f"{side}_bytes"]) for side in ("full_precision", "quantized"))
        out.print(
            printable(
                f"{encoder['component']} ({encoder['class_name']}): {before} in bf16, {after} quantized, "
                f"{encoder['linears']} linears {encoder['scheme']}"
            ),
            soft_wrap=True,
        )


def _attention_line(modules: int) -> str:
    return f"Attention: int8 queries and keys in {modules} modules"


def _show_layers(out: Console, report: Mapping[str, Any]) -> None:
    if report["simulated"]:
        out.print("Simulated: its linears have no integer kernel and run in floating point, slower than full precision")
    out.print(_layer_table(report["layers"]))


def _layer_table(layers: Sequence[Mapping[str, Any]]) -> Table:
    from s2q.common.components import pattern_of

    groups: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    for layer in layers:
        groups.setdefault((pattern_of(layer["name"]), layer["scheme"], tuple(layer["shape"])), []).append(
            layer["bytes"]
        )
    table = Table(header_style="dim", box=box.SIMPLE)
    table.add_column(f"{len(layers)} linears", overflow="fold")
    for column in ("count", "shape", "scheme", "bytes"):
        table.add_column(column, justify="right")
    for (kind, scheme, shape), sizes in list(groups.items())[:_MAX_LAYER_ROWS]:
        table.add_row(kind, str(len(sizes)), " × ".join(map(str, shape)), scheme, format_bytes(sum(sizes)))
    if len(groups) > _MAX_LAYER_ROWS:
        rest = list(groups.values())[_MAX_LAYER_ROWS:]
        count, total = sum(map(len, rest)), sum(map(sum, rest))
        table.add_row("others (see --json)", str(count), "", "", format_bytes(total))
    return table
