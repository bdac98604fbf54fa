"""Workers in processes of this machine: one device each.

Processes are spawned, each by an executor of its own, so that the death of one leaves the others at work. They do not
import the caller's script, which therefore needs no `if __name__ == "__main__":`.
"""

import contextlib
import logging
import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tqdm import tqdm

from s2q.common.errors import S2QError
from s2q.common.temporaries import scratch_folder
from s2q.engines.engine import REMEDY, LostWorkerError, WorkerEngine
from s2q.engines.workers import LOGGER, SealedWork, WorkerLoop, prepare, sendable, warm_up

logger = logging.getLogger(__name__)


class ProcessEngine(WorkerEngine):
    """Runs tasks in spawned processes, one for each entry of `devices`; they import `modules` as they start."""

    def __init__(self, devices: Sequence[str], *, modules: Sequence[str] = ()) -> None:
        self._scratch = contextlib.ExitStack()
        output = self._scratch.enter_context(scratch_folder("processes")) / "output.txt"
        output.touch()
        super().__init__(devices, [_ProcessSlot(device, output, modules) for device in devices])

    def seal(self, work: Any) -> SealedWork:
        """Return work that is pickled once for all processes."""
        return SealedWork(work)

    def close(self) -> None:
        """End the processes."""
        super().close()
        self._scratch.close()


class _SpawnContext(SpawnContext):
    """Knows the processes that were started through it; `multiprocessing` counts those of other threads too."""

    def __init__(self) -> None:
        super().__init__()
        self.children: list[BaseProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> SpawnProcess:  # type: ignore[override]  # noqa: N802
        child = SpawnProcess(*args, **kwargs)
        self.children.append(child)
        return child


class _ProcessSlot:
    def __init__(self, device: str, output: Path, modules: Sequence[str]) -> None:
        self.device, self.output, self.modules = device, output, modules
        self._pool: ProcessPoolExecutor | None = None

    def start(self) -> Future[Any]:
        self.context = _SpawnContext()
        self._messages, sender = self.context.Pipe(duplex=False)
        self._token = 0
        self._pool = ProcessPoolExecutor(
            1,
            mp_context=self.context,
            initializer=_start,
            initargs=(self.device, sender, str(self.output), LOGGER.getEffectiveLevel()),
        )
        with _as_worker():
            started = self._pool.submit(warm_up, self.modules)
        sender.close()
        # only the process can write results: the end of one that dies while it writes is then seen
        results: Any = self._pool._result_queue
        results._writer.close()
        return self._watched(started, is_start=True)

    def submit(self, work: SealedWork, token: int, task: Any) -> Future[Any]:
        sealed = work if token != self._token else None
        self._token = token
        assert self._pool is not None
        try:
            submitted = self._pool.submit(_call, sealed, token, task)
        except BrokenProcessPool as error:  # the process died while it waited for a task
            submitted = Future()
            submitted.set_exception(error)
        return self._watched(submitted)

    def messages(self) -> Iterator[Any]:
        with contextlib.suppress(EOFError, OSError):  # cut off by the death of the process
            while self._messages.poll():
                yield self._messages.recv()

    def kill(self) -> None:
        if self._pool is None:
            return
        children = [child for child in self.context.children if child.pid is not None]
        for child in children:
            child.kill()
        for child in children:
            child.join()
        self._pool.shutdown(cancel_futures=True)
        self._messages.close()

    def _watched(self, future: Future[Any], *, is_start: bool = False) -> Future[Any]:
        """Return a future that raises LostWorkerError where the process died; one that fails to start ends the run."""
        watched: Future[Any] = Future()

        def settle(done: Future[Any]) -> None:
            if done.cancelled():
                watched.cancel()
                return
            error = done.exception()
            if isinstance(error, BrokenProcessPool):
                code = _exit_code(self.context.children)
                text = _obituary(code, self._printed())
                error = S2QError(f"{text}; {REMEDY}") if is_start and code >= 0 else LostWorkerError(text)
            if error is None:
                watched.set_result(done.result())
            else:
                watched.set_exception(error)

        future.add_done_callback(settle)
        return watched

    def _printed(self) -> str:
        with contextlib.suppress(OSError):
            return self.output.read_text(encoding="utf-8", errors="replace")
        return ""


_SPAWNING = threading.Lock()


@contextlib.contextmanager
def _as_worker() -> Iterator[None]:
    """Spawn a process that neither imports the caller's script nor gets Ctrl-C, not even while it starts."""
    with _SPAWNING:
        multiprocessing.resource_tracker.ensure_running()  # changes the mask of signals when it starts
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        script = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = script
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _exit_code(children: Sequence[BaseProcess]) -> int:
    """Return the exit code of the process that broke a pool, which may come late."""
    child = children[-1]
    for _ in range(40):
        if child.exitcode is not None:
            return child.exitcode
        time.sleep(0.05)
    return -signal.SIGTERM


_loop: WorkerLoop | None = None  # of a spawned process, set once; always None in the process that spawned it


def _start(device: str, sender: Connection, output: str, log_level: int) -> None:
    """Prepare a spawned process: device, threads, output, logs, and its end with that of the parent."""
    global _loop  # noqa: PLW0603
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends its children
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or none
            os.dup2(descriptor, stream.fileno())
    tqdm.set_lock(threading.RLock())  # instead of a semaphore, which the end of the process would leave behind
    lock = threading.Lock()

    def tell(message: Any) -> None:
        with lock:
            sender.send(message)

    prepare(device, tell, log_level)
    _loop = WorkerLoop(device, tell)


def _end_with(parent: BaseProcess) -> None:
    """End this process when the one that spawned it is gone, killed perhaps."""
    parent.join()
    os._exit(1)


def _call(sealed: SealedWork | None, token: int, task: Any) -> Any:
    assert _loop is not None
    try:
        return _loop.run(sealed, token, task)
    except Exception as error:
        sent = sendable(error)
        if sent is error:
            raise
        raise sent from error


def _obituary(code: int, output: str) -> str:
    """Say how a process ended, by its exit code (negative for a signal) and what all processes printed."""
    line = output.strip().rpartition("\n")[2].strip()
    if code < 0:
        names = {signum.value: signum.name for signum in signal.Signals}
        how = f"by signal {names.get(-code, -code)}"
        how += ", often for lack of memory" if code == -signal.SIGKILL else ""
    else:
        how = f"with exit code {code}" + (f" ({line})" if line else "")
    return f"a worker was ended {how}"
