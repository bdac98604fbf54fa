"""The commands in the order of their work; the surface is stable: a test compares it with a golden text."""

from typing import Annotated

import typer

from s2q.cli.bench import bench
from s2q.cli.compare import compare
from s2q.cli.convert import convert
from s2q.cli.demo import demo
from s2q.cli.evaluate import evaluate
from s2q.cli.export import export
from s2q.cli.generate import generate
from s2q.cli.plan import plan
from s2q.cli.quantize import inspect, quantize

app = typer.Typer(
    name="s2q",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        typer.echo(f"s2q {metadata.version('s2q')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and all logs; allowed anywhere.")] = False,
) -> None:
    """4-bit quantization of text-to-video diffusion transformers, for any diffusers pipeline."""


for command in (demo, plan, quantize, generate, evaluate, compare, bench, inspect, export, convert):
    app.command("eval" if command is evaluate else None)(command)
