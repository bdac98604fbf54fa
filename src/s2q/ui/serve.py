"""Serving the page on this machine: what can fail is checked before a model is loaded."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from s2q.common.errors import BusyError, InvalidInputError, ResourceError, first_line
from s2q.common.temporaries import scratch_folder
from s2q.common.versions import is_installed
from s2q.ui.offers import offered
from s2q.ui.pipelines import Pipelines

logger = logging.getLogger(__name__)

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Gradio reads these when it is imported: it reports nothing about its use.
_QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}


def serve(
    checkpoints: Sequence[str | Path] = (),
    *,
    models: Sequence[str | Path] = (),
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
    device: str = "cpu",
    dtype: str | None = None,
    offload: str = "auto",
    backend: str = "auto",
    ready: Callable[[str, Sequence[str]], None] = lambda address, labels: None,
    until: Callable[[], bool] = lambda: False,
) -> None:
    """Serve the page until the process is interrupted.

    Args:
        checkpoints: s2q checkpoints to offer, by folder or Hub id.
        models: Full-precision models to offer; see `offered`.
        host: Address to listen on; 0.0.0.0 admits other machines.
        port: Port to listen on; 0 takes a free one.
        share: Whether Gradio opens a tunnel, with a public address, to the page.
        ready: Called with the address and the names of the offered models when the page is there.
        until: Asked every now and then whether to stop.

    Raises:
        ResourceError: If Gradio is not installed, or cannot reach its own server.
        BusyError: If the port is in use.
        InvalidInputError: If the host is not this machine's, or a model cannot be offered.
    """
    if not is_installed("gradio"):
        raise ResourceError("ui: gradio is not installed; pip install 's2q[ui]'")
    port = free_port(host, port)
    offers = offered(models, checkpoints)
    if host not in _LOOPBACK:
        logger.warning("ui: listening on %s; everybody who reaches this machine can use the page", host)
    with scratch_folder("ui") as folder, _environment(_QUIET | {"GRADIO_TEMP_DIR": str(folder / "uploads")}):
        from s2q.ui.page import STYLE, build_page, theme

        pipelines = Pipelines(folder, device=device, dtype=dtype, offload=offload, backend=backend)
        page = build_page(offers, pipelines)
        try:
            options = {"server_name": host, "server_port": port, "share": share}
            local, public = _launch(page, **options, theme=theme(), css=STYLE)
            if share and public is None:
                logger.warning("ui: Gradio opened no public address; the page is at %s only", local)
            ready(public or local, [offer.label for offer in offers])
            while not until():
                time.sleep(0.2)
        finally:
            page.close(verbose=False)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of this process, and set or remove them afterwards as they were before."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _launch(page: Any, **options: Any) -> tuple[str, str | None]:
    """Start the server; return its address and the public one. What Gradio prints goes to stderr."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            _, local, public = page.launch(
                quiet=True,
                prevent_thread_lock=True,
                inbrowser=False,
                footer_links=[],
                ssr_mode=False,
                enable_monitoring=False,
                mcp_server=False,
                **options,
            )
    except Exception as error:  # it asks its own server whether it is there; the HTTP client and each check differ
        raise ResourceError(
            f"ui: Gradio cannot serve the page ({first_line(error)}); with a proxy, set NO_PROXY=127.0.0.1,localhost"
        ) from error
    return local, public


def free_port(host: str, port: int) -> int:
    """Check that a port can be listened on; return it, or a free one for 0.

    Raises:
        BusyError: If something listens on it already.
        InvalidInputError: If the host is not an address of this machine, or the port needs more rights.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except socket.gaierror as error:
        raise InvalidInputError(f"--host {host}: {error.strerror}; pass an address of this machine") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise BusyError(
                f"--port {port}: in use on {host}; stop what uses it, or pass another (--port 0 takes a free one)"
            ) from error
        raise InvalidInputError(f"--host {host} --port {port}: cannot be listened on: {error.strerror}") from error
