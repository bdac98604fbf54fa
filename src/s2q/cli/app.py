"""The commands in the order of their work; the surface is stable: a test compares it with a golden text."""

from collections.abc import Callable
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
from s2q.cli.ui import ui
from s2q.common.errors import UsageError

app = typer.Typer(
    name="s2q",
    invoke_without_command=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_versions(*, as_json: bool) -> None:
    """Write the versions that affect results; nothing heavy is imported for them."""
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
        bool, typer.Option("--version", help="Show the versions that affect results, and exit.")
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


EXAMPLES = {
    "demo": ("s2q demo --short",),
    "plan": (
        "s2q plan -m shapes-cogvideox -r s2q-table-w4a8",
        "s2q plan -m synthetic:wan-14b --recipes s2q-w4a6,s2q-table-w4a8 --device h100",
    ),
    "quantize": (
        "s2q quantize -m shapes-cogvideox -r table-w4a8 -o shapes-w4a8",
        "s2q quantize -m Wan-AI/Wan2.1-T2V-1.3B-Diffusers -r s2q-table-w4a8 -o wan-w4a8 --prompts prompts.txt",
    ),
    "generate": ('s2q generate -m shapes-w4a8 --prompt "a red circle moving left on a grey background" -o videos',),
    "eval": ("s2q eval -m shapes-w4a8 --reference shapes-cogvideox --num-prompts 4 -o eval.json",),
    "compare": ("s2q compare table-w4a8 rtn-w4a8 -m shapes-cogvideox --num-prompts 4 -o compared",),
    "bench": ("s2q bench -m synthetic:cogvideox-2b --ops denoising_step -o bench.json",),
    "inspect": ("s2q inspect shapes-w4a8 --verify",),
    "export": ("s2q export shapes-w4a8 --to diffusers -o shapes-plain",),
    "convert": ("s2q convert sdnq-model -o converted",),
    "push": ("s2q push shapes-w4a8 acme/shapes-w4a8 --eval eval.json --videos videos",),
    "ui": ("s2q ui", "s2q ui runs/wan-w4a8 -m Wan-AI/Wan2.1-T2V-1.3B-Diffusers --device cuda"),
    "doctor": ("s2q doctor --device cpu",),
}
"""Examples of each command, shown at the end of its help."""


def _add(command: Callable[..., None], name: str) -> None:
    lines = [f"  {example}" for example in EXAMPLES[name]]
    app.command(name, epilog="\n".join(["\b", f"Example{'s' if len(lines) > 1 else ''}:", *lines]))(command)


for command in (demo, plan, quantize, generate, evaluate, compare, bench, inspect, export, convert, push, ui, doctor):
    _add(command, "eval" if command is evaluate else command.__name__)
