"""Commands of s2q that tests disturb: started in copies of one process that has imported everything."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from faults.server import READY

WORKERS = "--workers"
"""The option of `s2q quantize` that asks for several workers."""

TESTS = Path(__file__).parents[1]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TERM": "xterm-256color",
}
TIMED = ("s2q/report.json", "s2q/events.jsonl", "s2q/manifest.json", "README.md")
"""Files of a checkpoint that contain times; `s2q inspect --verify` checks the manifest."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code, negative for a signal, and what it printed."""

    code: int
    output: str


class Commands:
    """The server of `faults.server`; `folder` gets what commands print."""

    def __init__(self, folder: Path, model: Path, warm: Sequence[Sequence[str]]) -> None:
        self.folder, self.started = folder, 0
        settings = json.dumps({"model": str(model), "commands": [list(arguments) for arguments in warm]})
        self._server = subprocess.Popen(
            [sys.executable, "-m", "faults.server", settings],
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "server.txt").open("wb"),
            text=True,
        )
        answer = self._answer()
        assert READY in answer, (folder / "server.txt").read_text()
        self.mounts = bool(json.loads(answer)["mounts"])

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def start(
        self,
        arguments: Sequence[str],
        *,
        event: int | None = None,
        error: int = 0,
        number: int = signal.SIGKILL,
        log: Path | None = None,
        output: Path | None = None,
        memory: int | None = None,
        forks: bool = False,
    ) -> int:
        """Start a command with a fault of `faults.layer`; return its process, the leader of a session.

        `memory` is how many bytes of address space (RLIMIT_AS) it gets beyond those that it starts with.
        Its workers are spawned, or with `forks` copies that import nothing, which takes a fifth of the time.
        """
        self.started += 1
        request = {
            "arguments": [str(argument) for argument in arguments],
            "output": str(output or self._output()),
            "event": event,
            "error": error,
            "number": int(number),
            "log": None if log is None else str(log),
            "memory": memory,
            "forks": forks,
        }
        return int(self._ask({"start": request})["pid"])

    def wait(self, pid: int) -> int:
        """Return the exit code of a command, when it ends."""
        return int(self._ask({"wait": pid})["code"])

    def mount(self, folder: Path, *, size: int, flags: int = 0) -> Path:
        """Mount a disk of so many KiB for commands; return where this process sees it."""
        assert self._ask({"mount": [str(folder), size, flags]})["mounted"]
        return Path(f"/proc/{self._server.pid}/root{folder}")

    def run(self, arguments: Sequence[str], **fault: object) -> Outcome:
        """Run a command to its end."""
        code = self.wait(self.start(arguments, **fault))
        return Outcome(code, self.printed())

    def printed(self) -> str:
        """Return what the last command has printed."""
        return self._output().read_text()

    def events(self, arguments: Sequence[str]) -> list[str]:
        """Return the events of a command that nothing disturbs."""
        log = self.folder / f"events-{self.started}.txt"
        outcome = self.run(arguments, log=log)
        assert outcome.code == 0, outcome
        return log.read_text().splitlines()

    def _output(self) -> Path:
        return self.folder / f"output-{self.started}.txt"

    def _ask(self, request: dict) -> dict:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._answer())

    def _answer(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().strip()


def hashes(out: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint, by relative path, without those that contain times."""
    files = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
    assert set(TIMED) <= files.keys(), sorted(files)
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if name not in TIMED}


def stat_of(pid: int) -> list[str]:
    """State, parent, process group and session of a process."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]


def session_of(pid: int) -> Iterator[int]:
    """The processes of a session that live, zombies excluded."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                state, _, _, session = stat_of(int(entry))
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(session) == pid and state != "Z":
                yield int(entry)


def orphans(pid: int, *, seconds: float = 10) -> list[int]:
    """The processes of a session that still live after some seconds."""
    deadline = time.monotonic() + seconds
    while (left := list(session_of(pid))) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left
