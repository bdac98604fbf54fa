"""`s2q bench`: check everything, measure what the results file lacks, show the whole file as one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from s2q.cli import console, output
from s2q.cli.commands import check_file_output, resolve_device
from s2q.common.errors import InvalidInputError
from s2q.common.outputs import output_lock
from s2q.report.formatting import format_bytes

DEFAULT_RECIPES = ("s2q-w4a6", "s2q-w4a4")


def run_bench(out: Path, *, model: str | None, options: Mapping[str, Any]) -> None:
    """Run `s2q bench`.

    Args:
        out: JSON file to write; results that are in it are not measured again.
        model: What to measure; None takes published shapes and the embedded model.
        options: `ops`, `recipes`, `backends`, `attention`, `tokens`, `blocks`, `repeats`, `seconds`, `device`,
            `variant`, `again`, `as_json`.
    """
    from s2q import benchmark as bench
    from s2q.generation.defaults import generation_defaults
    from s2q.models.attention import check_attention_backend
    from s2q.recipes.load import load_recipe

    ops = bench.check_names("op", output.split_names(options["ops"]), bench.OPS)
    check_file_output(out, overwrite=True)
    device = resolve_device(options["device"])
    backends = bench.check_backends(output.split_names(options["backends"]), device)
    if options["attention"] is not None:
        check_attention_backend(options["attention"])
    recipes = tuple(load_recipe(name) for name in output.split_names(options["recipes"]) or DEFAULT_RECIPES)
    console.quiet_libraries()
    settings = bench.Settings(
        device=device,
        backends=backends,
        recipes=recipes,
        options=bench.TimingOptions(
            repeats=options["repeats"], min_repeats=min(3, options["repeats"]), seconds=options["seconds"]
        ),
        tokens=options["tokens"],
        blocks=options["blocks"],
        attention=options["attention"],
        generation=generation_defaults(model or bench.DEFAULT_MODEL),
    )
    cases = bench.make_cases(model, ops, settings, variant=options["variant"])
    if not cases:
        raise InvalidInputError(
            f"nothing to measure: none of {', '.join(ops)} runs here with {', '.join(backends)}, or applies to the "
            "recipes"
        )
    with console.progress() as report, output_lock(out):
        results = bench.open_results(out, device=device, again=options["again"])
        missing = bench.missing_cases(cases, results)
        bench.run_cases(missing, results, progress=report)
    output.emit_json(results.content) if options["as_json"] else show_results(results.content, ops=bench.OPS)
    console.say(f"written to {out}" if missing else f"{out} already has all results; --again repeats them")


def show_results(content: Mapping[str, Any], *, ops: Sequence[str]) -> None:
    """Show every result of a file in one table, and under it where the time of each denoising step goes.

    Args:
        content: As in `bench.json`.
        ops: The order of the ops.
    """
    from s2q.benchmark.results import place_of

    shown = output.wide_console()
    results = sorted(content["results"], key=lambda one: ops.index(one["op"]))
    hardware = content["hardware"]
    shown.print(
        Text.assemble(("Benchmark ", "bold"), f"{place_of(hardware)}, torch {content['versions']['torch']}"),
        soft_wrap=True,
    )
    shown.print(_result_table(results))
    steps = [one for one in results if one.get("breakdown")]
    if steps:
        shown.print(Text("Where the time of a denoising step goes, ms", style="bold"))
        shown.print(_breakdown_table(steps))


def _result_table(results: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(header_style="dim", box=box.SIMPLE, pad_edge=False)
    table.add_column("", overflow="fold")
    for name in ("recipe", "backend"):
        table.add_column(name, no_wrap=True)
    for name in ("ms", "baseline", "times", "bound", "memory", "storage"):
        table.add_column(name, justify="right", no_wrap=True)
    last = None
    for one in results:
        if one["op"] != last:
            table.add_row(Text(one["op"], style="bold"))
            last = one["op"]
        storage, full = one.get("storage_bytes"), one.get("bf16_storage_bytes")
        baseline = one.get("baseline", "bf16")  # the only one of earlier versions
        memory = one.get("peak_memory_bytes")
        table.add_row(
            _what(one),
            one["recipe"] or one["scheme"],
            f"auto: {one['ran']}" if one["backend"] == "auto" and one.get("ran") else one["backend"] or "–",
            _number(one["milliseconds"]),
            f"{baseline} {_number(one[f'{baseline}_milliseconds'])}",
            f"{one[f'ratio_to_{baseline}']:.2f}",
            "–" if one["bound_ratio"] is None else f"{one['bound_ratio']:.2f}",
            "–" if memory is None else format_bytes(memory),
            f"{full / storage:.2f}×" if storage and full else "–",
        )
    return table


def _breakdown_table(steps: Sequence[Mapping[str, Any]]) -> Table:
    parts = list(steps[0]["breakdown"])
    parts = [name for name in ("gemm", "activation_path", "attention", "norms", "other") if name in parts]
    table = Table(header_style="dim", box=box.SIMPLE, pad_edge=False)
    table.add_column("", overflow="fold")
    table.add_column("recipe", no_wrap=True)
    for part in parts:
        table.add_column(part.replace("_", " "), justify="right", no_wrap=True)
    previous = None
    for one in steps:
        if previous != _what(one):
            previous = _what(one)
            table.add_row(previous, "bf16", *(_number(one["bf16_breakdown"][name]) for name in parts))
        how = "" if one["backend"] in ("auto", "torch") else f", {one['backend']}"
        name = (one["recipe"] or one["scheme"]) + how
        table.add_row("", name, *(_number(one["breakdown"][part]) for part in parts))
    return table


def _what(result: Mapping[str, Any]) -> str:
    if result["shape"] is not None:
        together = f" ({result['readers']} together)" if result.get("readers") else ""
        return "×".join(map(str, result["shape"])) + together
    name = str(result["model"]).removeprefix("synthetic:")
    return name if result["tokens"] is None else f"{name}, {result['tokens']} tokens"


def _number(value: float) -> str:
    """Three digits that count: 0.0123, 1.23, 12.3, 1234."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
