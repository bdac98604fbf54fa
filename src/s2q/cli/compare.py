"""`s2q compare`: read its files, compare, show the table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from s2q.cli import console, next_steps, options, output
from s2q.common.errors import S2QError
from s2q.common.interrupts import resumable
from s2q.report import compare_table as comparison
from s2q.report.formatting import format_sample

Entries = Annotated[
    list[str] | None,
    typer.Argument(
        help="Recipe names, patterns such as s2q-*, recipe files, checkpoints.", metavar="RECIPE_OR_CHECKPOINT"
    ),
]
FullPrecisionModel = Annotated[
    str, options.model_option(help="The full-precision model: embedded name, folder, Hub id (@revision) or FILE@BASE.")
]
Recipes = Annotated[
    list[str] | None,
    options.recipe_option("--recipes", help="Recipes, comma-separated or repeated; all for every recipe."),
]
Peers = Annotated[
    list[str] | None,
    options.names_option("--peers", help="Other quantization tools to include: names; all for the installed ones."),
]
CompareFolder = Annotated[Path, options.folder_option("-o", "--output", help="Folder to write.")]
CalibrationPrompts = Annotated[
    Path | None, options.file_option("--calibration-prompts", help="Calibration prompts: text or JSONL file.")
]
RecipesOverrides = Annotated[
    list[str] | None, options.set_option(help="Override a field of the recipes, e.g. distillation.epochs=5.")
]
OverwriteComparison = Annotated[bool, typer.Option("--overwrite", help="Replace a comparison that cannot be resumed.")]


@options.takes_generation
def compare(
    entries: Entries = None,
    model: FullPrecisionModel = "shapes-cogvideox",
    recipes: Recipes = None,
    peers: Peers = None,
    out: CompareFolder = Path("s2q-compare"),
    prompts: options.Prompts = None,
    num_prompts: options.NumPrompts = 32,
    seeds: options.Seeds = 2,
    calibration_prompts: CalibrationPrompts = None,
    samples: options.Samples = None,
    seed: options.Seed = 0,
    overrides: RecipesOverrides = None,
    metrics: options.Metrics = None,
    lpips_weights: options.LpipsWeights = None,
    clip: options.ClipFolder = None,
    generation: options.Generation = options.NO_GENERATION,
    device: options.Device = "auto",
    dtype: options.DtypeOption = None,
    variant: options.Variant = None,
    loras: options.Loras = None,
    verify: options.Verify = None,
    workers: options.Workers = "auto",
    devices: options.Devices = None,
    engine: options.EngineName = "processes",
    ray_address: options.RayAddress = None,
    offload: options.OffloadName = "auto",
    resume: options.Resume = True,
    overwrite: OverwriteComparison = False,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Compare recipes and checkpoints with full precision and each other."""
    from s2q.comparison.compare import compare as run
    from s2q.comparison.folder import RUN

    console.quiet_libraries()
    with resumable(out / RUN), console.progress() as report:
        result = run(
            _split_entries([*(entries or ()), *(recipes or ())]),
            model=model,
            out=out,
            peers=peers or (),
            prompts=options.read_prompt_file(prompts),
            num_prompts=num_prompts,
            seeds=range(seeds),
            calibration_prompts=options.read_prompt_file(calibration_prompts),
            samples=samples,
            overrides=overrides or (),
            seed=seed,
            metrics=metrics or (),
            lpips_weights=lpips_weights,
            clip=clip,
            **generation,
            device=options.resolve_device(device),
            dtype=dtype,
            variant=variant,
            loras=loras or (),
            verify=verify,
            workers=workers,
            devices=devices or None,
            engine=engine,
            ray_address=ray_address,
            offload=offload,
            resume=resume,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=report,
        )
    if as_json:
        output.emit_json(result)
    elif dry_run:
        show_plan(result)
    else:
        show_comparison(result, page=(out / "index.html").resolve())
        next_steps.say_next(next_steps.after_compare(result, out))
    _raise_failed(result["entries"])


def _raise_failed(entries: Sequence[Mapping[str, Any]]) -> None:
    failed = [entry for entry in entries if entry["error"]]
    if failed:
        raise S2QError(f"{len(failed)} of {len(entries)} failed: {failed[0]['label']}: {failed[0]['error']}")


def show_plan(plan: Mapping[str, Any]) -> None:
    """Show what a comparison would do."""
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
    """Show the table of a comparison, who won what, and where the page is."""
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
    headings = ("storage", *(comparison.HEADINGS[name] for name in columns), "quantized in")
    table = output.new_table(right=headings)
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


def _split_entries(entries: Sequence[str]) -> list[str]:
    """Split at commas what is no path."""
    return [name for text in entries for name in ([text] if Path(text).exists() else options.split_names([text]))]
