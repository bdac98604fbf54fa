"""`s2q bench`: measure what the results file lacks, show the whole file as one table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from s2q.cli import console, next_steps, options, output
from s2q.common.interrupts import resumable
from s2q.common.outputs import check_file_output
from s2q.report.formatting import format_bytes

MeasuredModel = Annotated[
    str | None,
    options.model_option(
        help="synthetic:NAME (random weights: cogvideox-2b, cogvideox-5b, hunyuanvideo, ltx-2b, wan-1.3b, wan-14b), "
        "embedded name, folder or Hub id. Default: the layers of these six, and the step of shapes-cogvideox."
    ),
]
Ops = Annotated[
    list[str] | None,
    options.names_option(
        "--ops",
        help="Comma-separated ops. Default: "
        "linear,activation_path,gemm,attention_colsum,int8_attention,denoising_step,calibration_block.",
    ),
]
Recipes = Annotated[
    list[str] | None,
    options.recipe_option(
        help="Recipes, comma-separated or repeated. Default: s2q-w4a6,s2q-w4a4.", callback=options.split_names
    ),
]
Backends = Annotated[
    list[str] | None,
    options.names_option(
        "--backend", help="Comma-separated backends: auto,reference,cpu,triton,fastest,fp4. Default: auto."
    ),
]
Tokens = Annotated[
    int | None,
    options.number_option(
        "--tokens", help="Rows of an op, video tokens of a block. Default: the model's; on a CPU 2048 and 1024."
    ),
]
Blocks = Annotated[
    int, options.number_option("--blocks", help="Number of blocks of a synthetic model to build and time.")
]
Repeats = Annotated[int, options.number_option("--repeats", help="Maximum number of rounds.")]
Seconds = Annotated[
    float,
    typer.Option("--seconds", help="Start no new round after this time; at least three rounds.", min=0, metavar="X"),
]
BenchFile = Annotated[Path, typer.Option("-o", "--output", help="JSON file to write or resume.", metavar="FILE")]
Again = Annotated[bool, typer.Option("--again", help="Repeat measurements that the file already has.")]


def bench(
    model: MeasuredModel = None,
    ops: Ops = None,
    recipes: Recipes = None,
    backends: Backends = None,
    attention: options.AttentionBackend = None,
    tokens: Tokens = None,
    blocks: Blocks = 1,
    repeats: Repeats = 10,
    seconds: Seconds = 10.0,
    device: options.Device = "auto",
    variant: options.Variant = None,
    out: BenchFile = Path("bench.json"),
    again: Again = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure speed and memory against bf16: operations, denoising steps, calibration."""
    check_file_output(out, overwrite=True)
    from s2q.benchmark.bench import DEFAULT_RECIPES
    from s2q.benchmark.bench import bench as run

    console.quiet_libraries()
    before = out.read_bytes() if out.exists() else None
    with resumable(out), console.progress() as report:
        content = run(
            model,
            out=out,
            ops=ops or (),
            recipes=recipes or DEFAULT_RECIPES,
            backends=backends or ("auto",),
            attention_backend=attention,
            tokens=tokens,
            blocks=blocks,
            repeats=repeats,
            seconds=seconds,
            device=options.resolve_device(device),
            variant=variant,
            again=again,
            progress=report,
        )
    output.emit_json(content) if as_json else show_results(content)
    is_new = out.read_bytes() != before
    console.say(f"written to {out}" if is_new else f"{out} already has all results; --again repeats them")
    if not as_json:
        next_steps.say_next([["plan", "-m", model or "shapes-cogvideox", "--recipes", "all"]])


def show_results(content: Mapping[str, Any]) -> None:
    """Show every result of a file in one table, and under it where the time of each denoising step goes."""
    from s2q.benchmark.case import OPS
    from s2q.benchmark.results import place_of

    shown = output.wide_console()
    results = sorted(content["results"], key=lambda result: OPS.index(result["op"]))
    hardware = content["hardware"]
    shown.print(
        Text.assemble(("Benchmark ", "bold"), f"{place_of(hardware)}, torch {content['versions']['torch']}"),
        soft_wrap=True,
    )
    shown.print(_result_table(results))
    steps = [result for result in results if result.get("breakdown")]
    if steps:
        shown.print(Text("Where the time of a denoising step goes, ms", style="bold"))
        shown.print(_breakdown_table(steps))


def _result_table(results: Sequence[Mapping[str, Any]]) -> Table:
    numbers = ("ms", "baseline", "times", "bound", "memory", "storage")
    table = output.new_table(left=("recipe", "backend"), right=numbers, fold=True)
    last = None
    for result in results:
        if result["op"] != last:
            table.add_row(Text(result["op"], style="bold"))
            last = result["op"]
        storage, full = result.get("storage_bytes"), result.get("bf16_storage_bytes")
        baseline = result.get("baseline", "bf16")  # the only baseline of earlier versions
        memory = result.get("peak_memory_bytes")
        table.add_row(
            _what(result),
            result["recipe"] or result["scheme"],
            f"auto: {result['ran']}" if result["backend"] == "auto" and result.get("ran") else result["backend"] or "–",
            _number(result["milliseconds"]),
            f"{baseline} {_number(result[f'{baseline}_milliseconds'])}",
            f"{result[f'ratio_to_{baseline}']:.2f}",
            "–" if result["bound_ratio"] is None else f"{result['bound_ratio']:.2f}",
            "–" if memory is None else format_bytes(memory),
            f"{full / storage:.2f}×" if storage and full else "–",
        )
    return table


def _breakdown_table(steps: Sequence[Mapping[str, Any]]) -> Table:
    names = ("gemm", "activation_path", "attention", "norms", "other")
    parts = [name for name in names if name in steps[0]["breakdown"]]
    table = output.new_table(left=["recipe"], right=[part.replace("_", " ") for part in parts], fold=True)
    previous = None
    for result in steps:
        if previous != _what(result):
            previous = _what(result)
            table.add_row(previous, "bf16", *(_number(result["bf16_breakdown"][name]) for name in parts))
        how = "" if result["backend"] in ("auto", "torch") else f", {result['backend']}"
        name = (result["recipe"] or result["scheme"]) + how
        table.add_row("", name, *(_number(result["breakdown"][part]) for part in parts))
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
