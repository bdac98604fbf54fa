"""`s2q ui`."""

from collections.abc import Sequence
from typing import Annotated

import typer

from s2q.cli import console, options
from s2q.cli.generate import Backend, check_backend
from s2q.common.records import UI_VERSION

Checkpoints = Annotated[
    list[str] | None, typer.Argument(help="s2q checkpoints to offer: folders or Hub ids.", metavar="CHECKPOINT")
]
Models = Annotated[
    list[str] | None,
    options.model_option(
        help="Full-precision model to offer; repeatable. Default: those of the checkpoints, or all embedded."
    ),
]


def ui(
    checkpoints: Checkpoints = None,
    model: Models = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.", metavar="HOST")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", help="Port; 0 takes a free one.", metavar="N", min=0, max=65535)
    ] = 7860,
    share: Annotated[bool, typer.Option("--share", help="Open a public address through Gradio's tunnel.")] = False,
    backend: Annotated[Backend, typer.Option("--backend", help="Backends of quantized linears.")] = "auto",
    device: options.Device = "auto",
    dtype: options.DtypeOption = None,
    offload: options.OffloadName = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Compare two models on a page in the browser: prompt in, both videos and their difference out."""
    from s2q.cli import output
    from s2q.ui.serve import serve

    def ready(address: str, models: Sequence[str]) -> None:
        if as_json:
            output.emit_json({"schema_version": UI_VERSION, "address": address, "models": list(models)})
        else:
            console.say(f"s2q ui: {address} (Ctrl+C stops it)")

    device = options.resolve_device(device)
    check_backend(backend, device)
    console.quiet_libraries()
    serve(
        checkpoints or (),
        models=model or (),
        host=host,
        port=port,
        share=share,
        device=device,
        dtype=dtype,
        offload=offload,
        backend=backend,
        ready=ready,
    )
