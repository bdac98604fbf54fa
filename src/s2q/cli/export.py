"""`s2q export`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from s2q.cli import options

Target = Literal["diffusers", "sdnq", "comfyui", "gguf"]
Component = Literal["transformer", "transformer_2"]


def export(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or Hub id (@revision).", metavar="CHECKPOINT")],
    to: Annotated[Target, typer.Option("--to", help="Format to write.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="Folder or file to write.", metavar="OUT")],
    component: Annotated[
        Component | None, typer.Option("--component", help="Which of two transformers to export, for comfyui and gguf.")
    ] = None,
    variant: options.Variant = None,
    verify: options.Verify = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Write a checkpoint in the format of another program."""
    from s2q.cli import console, output
    from s2q.exports.export import export as run

    console.quiet_libraries()
    with console.progress() as report:
        result = run(
            model,
            to=to,
            out=out,
            component=component,
            variant=variant,
            verify=verify,
            overwrite=overwrite,
            progress=report,
        ).to_dict()
    if as_json:
        output.emit_json(result)
    else:
        formats = ", ".join(f"{count} {name}" for name, count in result["linears"].items())
        ratio = result["storage"]["ratio"]
        console.say(f"{out}: {formats} linears, {ratio:.2f} times smaller than bf16")
        console.say(f"load: {result['loading'].replace('(OUT', f'({str(out)!r}')}")
