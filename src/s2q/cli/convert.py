"""`s2q convert`."""

from pathlib import Path
from typing import Annotated

import typer

from s2q.cli import options


def convert(
    model: Annotated[
        str,
        typer.Argument(
            help="SDNQ's pipeline folder or Hub id (@revision), or ComfyUI's .safetensors.", metavar="SOURCE"
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--output", help="Folder of the checkpoint.", metavar="OUT")],
    base: Annotated[
        str | None,
        typer.Option("--base", help="Pipeline with the other components; needed for a file.", metavar="MODEL"),
    ] = None,
    variant: options.Variant = None,
    verify: options.Verify = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Make a checkpoint of a model that another program has quantized."""
    from s2q.cli import console, next_steps, output
    from s2q.exports.convert import convert as run

    console.quiet_libraries()
    with console.progress() as report:
        result = run(
            model, out=out, base=base, variant=variant, verify=verify, overwrite=overwrite, progress=report
        ).to_dict()
    if as_json:
        output.emit_json(result)
    else:
        schemes = ", ".join(f"{count} {name}" for name, count in result["linears"].items())
        ratio = result["storage"]["ratio"]
        console.say(f"{out}: {schemes} linears from {result['tool']}, {ratio:.2f} times smaller than bf16")
        next_steps.say_next([next_steps.generate_with(out), next_steps.evaluate_with(out, base)])
