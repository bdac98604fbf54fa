"""A process that has imported everything and forks a copy of itself for each command of s2q.

It reads a request a line and answers each with a line, both JSON: {"start": {...}} gives {"pid": 1}, {"wait": 1} the
exit code, {"mount": [folder, KiB, flags]} a small disk. A copy is the leader of a session, so whatever it leaves behind
can be found.
"""

import ctypes
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import threading
from pathlib import Path

READY = "ready"
READ_ONLY, REMOUNT = 1, 32
"""Flags of mount(2)."""

_PRIVATE, _NEW_MOUNTS, _NEW_USER = 0x44000, 0x20000, 0x10000000
_libc = ctypes.CDLL(None, use_errno=True)


def isolate() -> bool:
    """Give this process mounts of its own; False if the system does not let it."""
    user, group = os.getuid(), os.getgid()
    if _libc.unshare(_NEW_MOUNTS if user == 0 else _NEW_MOUNTS | _NEW_USER):
        return False
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    return _libc.mount(None, b"/", None, _PRIVATE, None) == 0


def mount(folder: str, size: int, flags: int) -> bool:
    """Mount a disk of so many KiB, or mount it again with another size."""
    options = f"size={size}k".encode()
    return _libc.mount(b"tmpfs", folder.encode(), b"tmpfs", flags, options) == 0


def preload(settings: dict) -> None:
    """Import all that commands import, by running them once; no thread may be left, since a fork copies one."""
    import tqdm

    from s2q.calibration import calibration_set
    from s2q.cli import run
    from s2q.common import devices
    from s2q.shapes import embedded

    tqdm.tqdm.monitor_interval = 0  # no thread
    tqdm.tqdm.set_lock(threading.RLock())  # copies would share its own, which a killed one does not give back
    calibration_set.selection_plot = lambda record: b"\x89PNG not drawn in tests"
    devices.has_arithmetic = lambda dtype: True
    embedded.embedded_folder = lambda name: Path(settings["model"])
    with tempfile.TemporaryDirectory() as scratch:
        for number, arguments in enumerate(settings["commands"]):
            code = run([*arguments, "-o", str(Path(scratch) / str(number))])
            assert code == 0, (arguments, code)
    threads = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    assert len(threads) == 1, threads


def serve(request: dict) -> dict:
    """Answer a request."""
    if "start" in request:
        return {"pid": _start(**request["start"])}
    if "mount" in request:
        return {"mounted": mount(*request["mount"])}
    _, status = os.waitpid(request["wait"], 0)
    return {"code": os.waitstatus_to_exitcode(status)}


def _start(
    arguments: list[str],
    output: str,
    event: int | None,
    error: int,
    number: int,
    log: str | None,
    memory: int | None,
    forks: bool,
) -> int:
    """Run a command in a copy of this process; `forks` makes its workers copies too, which import nothing."""
    from s2q.engines import processes

    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for commands in the background
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(os.open(output, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644), 1)  # a terminal controls the session
        os.dup2(1, 2)
        sys.stdout, sys.stderr = (open(descriptor, "w", closefd=False) for descriptor in (1, 2))  # noqa: SIM115
        if memory is not None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            size = pages * resource.getpagesize() + memory
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
        if forks:
            processes.SpawnProcess = multiprocessing.context.ForkProcess
        code = _run(arguments, event, error, number, log=log)
        sys.stdout.flush()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _run(arguments: list[str], event: int | None, error: int, number: int, *, log: str | None) -> int:
    from faults.layer import Fault, FileLayer
    from s2q.cli import console, run

    console.stderr = console.Console(stderr=True, soft_wrap=True)
    if log is not None or event is not None:
        append, write = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), os.write
        FileLayer(Fault(event, error, number), lambda line: write(append, f"{line}\n".encode())).install()
    return run(arguments)


def main() -> None:
    """Answer requests until standard input ends."""
    isolated = isolate()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the output of commands is no answer
    preload(json.loads(sys.argv[1]))
    print(json.dumps({READY: True, "mounts": isolated}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
