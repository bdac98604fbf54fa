"""`s2q doctor`."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from s2q.cli import options
from s2q.common.errors import S2QError


def doctor(
    device: Annotated[
        str | None,
        typer.Option(
            "--device", help="Device to test: cpu, cuda or cuda:N. Default: the CPU and every GPU.", metavar="D"
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show devices, backends, versions and what is missing; test every backend against the reference."""
    from s2q.cli import next_steps, output

    devices = None if device is None else [options.resolve_device(device)]
    from s2q.benchmark.diagnosis import all_devices, diagnose

    diagnosis = diagnose(devices or all_devices())
    output.emit_json(diagnosis) if as_json else _show(diagnosis)
    failed = [row for row in diagnosis["backends"] if row["status"] == "failed"]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        first = failed[0]
        raise S2QError(
            f"doctor: backend {first['backend']!r} on {first['device']} fails its self-test: {first['reason']}{more}; "
            "use --backend reference, and report the output of s2q doctor --json"
        )
    if not as_json:
        next_steps.say_next([["demo", "--short"]])


def _show(diagnosis: Mapping[str, Any]) -> None:
    """Show a diagnosis: devices, a table of backends, a table of needs."""
    from s2q.cli.output import new_table, wide_console
    from s2q.report.formatting import format_bytes

    out = wide_console()
    versions = (f"{name} {version}" for name, version in diagnosis["versions"].items() if version is not None)
    out.print(", ".join(versions), soft_wrap=True, highlight=False)
    for device in diagnosis["devices"]:
        name = device.get("gpu") or f"{device['processor']}, {device['instruction_set']}, {device['cores']} cores"
        products = device["products"]["integer"]
        integer = ", ".join(width.upper() for width in products) or "none"
        line = f"{device['name']}: {name}, {format_bytes(device['memory_bytes'])}; integer products: {integer}"
        limit = f"; limited by {device['limited_by']}" if device["limited_by"] else ""
        out.print(line + limit, soft_wrap=True, highlight=False, markup=False)
    backends = new_table("device", left=("backend", "self-test"), right=("tests", "largest error"))
    for row in diagnosis["backends"]:
        error = row["largest_error"]
        result = row["status"] if row["reason"] is None else f"{row['status']}: {row['reason']}"
        cells = (f"{row['passed']} of {row['tests']}", "" if error is None else f"{error:.1e}")
        backends.add_row(row["device"], row["backend"], result, *cells)
    out.print(backends)
    missing = [need for need in diagnosis["needs"] if need["obstacle"] is not None]
    for need in missing:
        optional = need["optional"]
        head = f"{need['obstacle']} (optional): {need['name']}" if optional else f"missing: {need['name']}"
        cause = "" if optional else f" ({need['obstacle']})"
        out.print(
            f"{head}{cause}, for {need['purpose']}; without: {need['without']}; remedy: {need['remedy']}",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
    if not missing:
        out.print("nothing is missing")
