"""Evaluating shards, in this process or in several that take them in turn.

On a CPU each of several processes has one thread; several GPUs take turns. A process that dies loses the shard that it
had, and no other work.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import IO

import torch

from s2q.comparing.folder import CompareFolder
from s2q.comparing.setup import SHARD_PROMPTS, RunPlan
from s2q.comparing.shards import Reports, Shard, evaluate_shard
from s2q.core import errors
from s2q.core.errors import S2QError

_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def evaluate_shards(
    folder: CompareFolder,
    plan: RunPlan,
    shards: Sequence[Shard],
    *,
    device: str,
    processes: int,
    stepped: Callable[[], None],
) -> dict[str, str]:
    """Evaluate shards; results are stored in the folder as soon as they are there.

    Args:
        folder: The comparison.
        plan: What it is.
        shards: What is to be done.
        device: Where to compute; several processes share the GPUs that "cuda" means.
        processes: How many processes take part; 1 computes in this one.
        stepped: Called after every step; one call at a time.

    Returns:
        Why entries failed, by label; a failed entry is left out of the shards after that.

    Raises:
        S2QError: The reference failed, or a process died; what the others finished is kept.
    """
    failures: dict[str, str] = {}
    workers = min(processes, len(shards))
    if workers > 1:
        _Pool(folder, shards, failures, stepped).run(_devices(device, workers))
        return failures
    reports = Reports(stepped=stepped, failed=failures.setdefault)
    for shard in shards:
        left = _without(shard, failures)
        if left.labels:
            evaluate_shard(folder, plan, left, device=device, reports=reports)
    return failures


class _Pool:
    """Processes, each served by a thread that hands it one shard after the other."""

    def __init__(
        self,
        folder: CompareFolder,
        shards: Sequence[Shard],
        failures: dict[str, str],
        stepped: Callable[[], None],
    ) -> None:
        self.folder = folder
        self.failures = failures
        self.stepped = stepped
        self.todo: queue.SimpleQueue[Shard] = queue.SimpleQueue()
        for shard in shards:
            self.todo.put(shard)
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        self.running: set[subprocess.Popen[str]] = set()
        self.problems: list[S2QError] = []

    def run(self, devices: Sequence[str]) -> None:
        with ThreadPoolExecutor(len(devices)) as threads:
            try:
                for future in wait([threads.submit(self._serve, device) for device in devices]).done:
                    future.result()
            finally:  # an interruption arrives here, in the main thread
                self.stopped.set()
                with self.lock:
                    for process in self.running:
                        process.kill()
        if self.problems:
            raise self.problems[0]

    def _serve(self, device: str) -> None:
        with self._worker(device) as (process, complaints):
            while not self.stopped.is_set():
                try:
                    shard = _without(self.todo.get_nowait(), self.failures)
                except queue.Empty:
                    return
                if shard.labels and not self._give(process, shard):
                    if not self.stopped.is_set():
                        self.problems.append(_death(process.wait(), shard, complaints))
                    return

    def _give(self, process: subprocess.Popen[str], shard: Shard) -> bool:
        """Have a shard evaluated; tell whether the process lives."""
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"index": shard.index, "labels": shard.labels}) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return False
        for line in process.stdout:
            message = json.loads(line)
            if "stepped" in message:
                with self.lock:
                    self.stepped()
            elif "failed" in message:
                self.failures.setdefault(message["failed"], message["why"])
            elif "error" in message:
                self.problems.append(getattr(errors, message["error"])(message["why"]))
                self.stopped.set()
                return True
            else:
                return True
        return False

    @contextlib.contextmanager
    def _worker(self, device: str) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
        """Start a process, of a session of its own so that Ctrl-C reaches this one alone, which ends it."""
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints:
            process = subprocess.Popen(
                [sys.executable, "-m", "s2q.comparing.worker", str(self.folder.path), device],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                text=True,
                start_new_session=True,
                env=os.environ | (_ONE_THREAD if device == "cpu" else {}),
            )
            with self.lock:
                self.running.add(process)
                if self.stopped.is_set():
                    process.kill()
            try:
                yield process, complaints
            finally:
                assert process.stdin is not None
                assert process.stdout is not None
                with contextlib.suppress(BrokenPipeError):  # what a dead process has not read
                    process.stdin.close()
                process.wait()
                process.stdout.close()
                with self.lock:
                    self.running.discard(process)


def _devices(device: str, count: int) -> list[str]:
    if device != "cuda":
        return [device] * count
    return [f"cuda:{index % torch.cuda.device_count()}" for index in range(count)]


def _without(shard: Shard, failures: dict[str, str]) -> Shard:
    return Shard(index=shard.index, labels=tuple(label for label in shard.labels if label not in failures))


def _death(code: int, shard: Shard, complaints: IO[str]) -> S2QError:
    complaints.seek(0)
    lines = complaints.read().strip().splitlines()
    how = f"with exit code {code}"
    if code < 0:
        how = f"by signal {signal.Signals(-code).name}" + (
            ", often for want of memory" if code == -signal.SIGKILL else ""
        )
    elif lines:
        how += f" ({lines[-1].strip()})"
    first = shard.index * SHARD_PROMPTS + 1
    return S2QError(
        f"a process that evaluated the prompts from {first} on was ended {how}; run the same command again, with fewer "
        "--processes if memory is short: what is finished is kept"
    )
