"""`s2q compare`: read its files, compare, show the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from s2q.cli import console, output
from s2q.cli.commands import resolve_device
from s2q.common.errors import S2QError
from s2q.report import compare_table as comparison
from s2q.report.formatting import format_sample


def run_compare(
    entries: Sequence[str],
    model: str,
    out: Path,
    *,
    prompts: Path | None,
    options: Mapping[str, Any],
    as_json: bool,
) -> None:
    """Run `s2q compare`.

    Args:
        entries: Recipes and checkpoints as they were named, several by comma where no file is called so.
        model: The full-precision reference.
        out: Folder to write.
        prompts: File with the prompts.
        options: Fields of `CompareOptions`; `calibration_prompts` is a file.
        as_json: Whether to write compare.json to stdout.

    Raises:
        S2QError: Entries failed; everything else is there.
    """
    overrides = output.parse_overrides(options["overrides"])
    device = resolve_device(options["device"])
    from s2q.comparison.compare import compare
    from s2q.comparison.setup import CompareOptions
    from s2q.generation.prompts import read_prompts

    console.quiet_libraries()
    calibration = options["calibration_prompts"]
    chosen = CompareOptions(
        **{
            **options,
            "overrides": overrides,
            "metrics": output.split_names(options["metrics"]),
            "calibration_prompts": None if calibration is None else read_prompts(calibration),
            "device": device,
        }
    )
    texts = None if prompts is None else read_prompts(prompts)
    with console.progress() as report:
        result = compare(_named(entries), model, out=out, prompts=texts, options=chosen, progress=report)
    if as_json:
        output.emit_json(result)
    elif chosen.dry_run:
        show_plan(result)
    else:
        show_comparison(result, page=(out / "index.html").resolve())
    failed = [entry for entry in result["entries"] if entry["error"]]
    if failed:
        first = failed[0]
        raise S2QError(f"{len(failed)} of {len(result['entries'])} failed: {first['label']}: {first['error']}")


def show_plan(plan: Mapping[str, Any]) -> None:
    """Show what a comparison would do.

    Args:
        plan: What a dry run returned.
    """
    out = output.wide_console()
    sample = format_sample(plan["n_prompts"], plan["n_seeds"])
    out.print(Text.assemble(("Comparison ", "bold"), f"with {plan['model']}, {sample}: {plan['n_videos']} videos"))
    table = Table("", "width", "storage", header_style="dim", box=box.SIMPLE, pad_edge=False)
    table.add_column("", overflow="fold")
    for entry in plan["entries"]:
        storage = "–" if entry["storage"] is None else f"{entry['storage']['ratio']:.2f}×"
        note = entry["error"] or (f"checkpoint {entry['checkpoint']}" if entry["checkpoint"] else entry["description"])
        table.add_row(entry["label"], entry["width"], storage, Text(note, style="red" if entry["error"] else "dim"))
    out.print(table)


def show_comparison(result: Mapping[str, Any], *, page: Path) -> None:
    """Show the table of a comparison, who won what, and where the page is.

    Args:
        result: The content of `compare.json`.
        page: The page.
    """
    out = output.wide_console()
    out.print(Text.assemble((comparison.title(result), "bold")), soft_wrap=True)
    out.print(comparison.sample(result), highlight=False, soft_wrap=True)
    if result["warning"]:
        out.print(Text(f"Warning: {result['warning']}", style="yellow"), soft_wrap=True)
    out.print(_table(result))
    for group in comparison.groups_of(result):
        if group.verdict:
            out.print(group.verdict, highlight=False, soft_wrap=True)
    out.print(Text.assemble("Report: ", (page.as_uri(), "bold cyan")), soft_wrap=True)


def _table(result: Mapping[str, Any]) -> Table:
    columns = comparison.columns_of(result)
    table = Table(header_style="dim", box=box.SIMPLE, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("storage", *(comparison.HEADINGS[name] for name in columns), "quantized in"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row("full precision", "1.00×", *(_shown(cell) for cell in comparison.reference_cells(result)), "")
    for group in comparison.groups_of(result):
        table.add_row(Text(group.width, style="bold"))
        for row in group.rows:
            label = Text(row.label)
            for tag in row.tags:
                label.append(f" {tag}", style="dim")
            if row.error:
                table.add_row(label, Text("failed", style="red"))
            else:
                table.add_row(label, row.storage, *(_shown(cell) for cell in row.cells), row.seconds)
    floor = comparison.floor_cells(result)
    if floor:
        table.add_row("another seed", "", *(_shown(cell) for cell in floor), "")
    return table


def _shown(cell: comparison.Cell) -> Text:
    """The mean, with the interval where it is the figure that entries are ranked by."""
    text = Text("" if cell.value == "–" else cell.value, style="bold green" if cell.best else "")
    if cell.metric == "velocity_relative_error" and cell.interval != "–":
        text.append(f" [{cell.interval}]", style="dim")
    return text


def _named(entries: Sequence[str]) -> list[str]:
    found: list[str] = []
    for text in entries:
        found += [text] if Path(text).exists() else output.split_names([text])
    return found
