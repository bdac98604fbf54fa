"""The commands in the order of their work; the surface is stable: a test compares it with a golden text."""

from typing import Annotated

import typer

from s2q.cli.bench import bench
from s2q.cli.compare import compare
from s2q.cli.convert import convert
from s2q.cli.demo import demo
from s2q.cli.doctor import doctor
from s2q.cli.evaluate import evaluate
from s2q.cli.export import export
from s2q.cli.generate import generate
from s2q.cli.plan import plan
from s2q.cli.push import push
from s2q.cli.quantize import inspect, quantize
from s2q.common.errors import UsageError

app = typer.Typer(
    name="s2q",
    invoke_without_command=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_versions(*, as_json: bool) -> None:
    """Write the versions that decide a result; nothing heavy is imported for them."""
    from s2q.cli.output import emit_json
    from s2q.common.records import VERSIONS_VERSION
    from s2q.common.versions import WITH_KERNELS, package_versions

    versions = package_versions(WITH_KERNELS)
    if as_json:
        emit_json({"schema_version": VERSIONS_VERSION, "versions": versions})
        return
    others = (f"{name} {version or 'not installed'}" for name, version in versions.items() if name != "s2q")
    typer.echo(f"s2q {versions['s2q']} ({', '.join(others)})")


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the versions that decide a result, and exit.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --version: one JSON object on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and all logs; allowed anywhere.")] = False,
) -> None:
    """4-bit quantization of text-to-video diffusion transformers, for any diffusers pipeline."""
    if version:
        _show_versions(as_json=as_json)
        raise typer.Exit
    if as_json:
        raise UsageError("s2q: --json before a command belongs to --version; put it after the command")
    if context.invoked_subcommand is None:
        raise UsageError("s2q: no command; see s2q --help")


for command in (demo, plan, quantize, generate, evaluate, compare, bench, inspect, export, convert, push, doctor):
    app.command("eval" if command is evaluate else None)(command)
