"""Independent tasks in several processes: one device a process, one thread a process on a CPU.

Tasks are claimed one at a time, so no process waits for a slower one. Processes are spawned: a script that asks for
several needs the guard `if __name__ == "__main__":`, as with every use of `multiprocessing`.

Example: dict(ProcessEngine(["cpu", "cpu"]).map(work, tasks)) has work(task, device, tell) by the index of each task.
"""

import contextlib
import functools
import logging
import logging.handlers
import multiprocessing
import os
import queue
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

import torch

from s2q.common.errors import S2QError, first_line

Tell = Callable[[Any], None]
"""Called in a process with a message for the caller; any picklable value."""

_POLL_SECONDS = 0.1
_LOGGER = logging.getLogger("s2q")
_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def devices_of(device: str, count: int) -> list[str]:
    """Return the device of each of several processes: GPUs take turns if "cuda" names no particular one."""
    if device != "cuda":
        return [device] * count
    return [f"cuda:{index % torch.cuda.device_count()}" for index in range(count)]


def most_on_one_device(device: str, count: int) -> int:
    """Return how many of several processes share a device at most."""
    return max(Counter(devices_of(device, count)).values())


def cpu_count() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ProcessEngine:
    """Runs tasks in spawned processes."""

    def __init__(self, devices: Sequence[str]) -> None:
        self.devices = devices

    def map(
        self,
        work: Callable[[_Task, str, Tell], _Result],
        tasks: Iterable[_Task],
        *,
        on_message: Callable[[Any], None] = lambda message: None,
    ) -> Iterator[tuple[int, _Result]]:
        """Like `concurrent.futures.Executor.map`, with tasks drawn one at a time and results in the order they end.

        Args:
            work: A picklable callable, sent to each process once, so that it may keep a model from task to task.
                Called with a task, the device of its process, and a function that sends a message to `on_message`.

        Yields:
            Index and result of each task.
        """
        context = _SpawnContext()
        messages, free_devices = context.SimpleQueue(), context.SimpleQueue()
        for device in self.devices:
            free_devices.put(device)
        upcoming = enumerate(tasks)
        running: dict[Future[_Result], int] = {}
        with tempfile.NamedTemporaryFile("r", prefix="s2q-processes-", encoding="utf-8", errors="replace") as output:
            pool = ProcessPoolExecutor(
                len(self.devices),
                mp_context=context,
                initializer=_start,
                initargs=(_SealedWork(work), free_devices, messages, output.name, _LOGGER.getEffectiveLevel()),
            )
            try:
                while True:
                    while len(running) < len(self.devices) and (drawn := next(upcoming, None)) is not None:
                        running[pool.submit(_call, drawn[1])] = drawn[0]
                    if not running:
                        break
                    done, _ = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
                    while not messages.empty():
                        message = messages.get()
                        if isinstance(message, logging.LogRecord):
                            logging.getLogger(message.name).handle(message)
                        else:
                            on_message(message)
                    if any(child.exitcode for child in context.children):  # unseen by a pool that waited for others
                        raise BrokenProcessPool
                    for future in done:
                        yield running.pop(future), future.result()
            except BrokenProcessPool as error:
                code = _cause(context.children)
                _kill(context.children)
                raise S2QError(_obituary(code, output.read())) from error
            except BaseException:
                _kill(context.children)
                raise
            finally:
                pool.shutdown(cancel_futures=True)


class _SpawnContext(SpawnContext):
    """Knows the processes that were started through it; `multiprocessing` counts those of other threads too."""

    def __init__(self) -> None:
        super().__init__()
        self.children: list[BaseProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> SpawnProcess:  # type: ignore[override]  # noqa: N802
        child = SpawnProcess(*args, **kwargs)
        self.children.append(child)
        return child


def _cause(children: Sequence[BaseProcess]) -> int:
    """Return the exit code that broke a pool; the pool ends its other processes by SIGTERM, and codes may come late."""
    for _ in range(40):
        codes = [child.exitcode for child in children if child.pid is not None]
        causes = [code for code in codes if code not in (None, 0, -signal.SIGTERM)]
        if causes:
            return causes[0] or 0
        if None not in codes:
            break
        time.sleep(0.05)
    return -signal.SIGTERM


def _kill(children: Sequence[BaseProcess]) -> None:
    """Kill the processes that live."""
    started = [child for child in children if child.pid is not None]
    for child in started:
        child.kill()
    for child in started:
        child.join()


class _SealedWork:
    """Work on the way to a process, which opens it with its first task: there an error reaches the caller."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def __reduce__(self) -> tuple[Any, ...]:
        return _SealedWork, (bytes(ForkingPickler.dumps(self.content)),)

    @functools.cached_property
    def opened(self) -> Callable[[Any, str, Tell], Any]:
        try:
            work: Callable[[Any, str, Tell], Any] = ForkingPickler.loads(self.content)
        except (AttributeError, ImportError) as error:
            raise S2QError(
                f"a process cannot load its work ({first_line(error)}); define it in a module that can be imported, "
                "not in a notebook, or use one process"
            ) from error
        return work


@dataclass(frozen=True)
class _Worker:
    """A spawned process: its work, its device and its message channel."""

    work: _SealedWork
    device: str
    tell: Tell


_worker: _Worker | None = None  # of a spawned process, set once; always None in the process that spawned it


class _LogSender(logging.handlers.QueueHandler):
    def __init__(self, tell: Tell) -> None:
        super().__init__(queue.SimpleQueue())
        self.tell = tell

    def enqueue(self, record: logging.LogRecord) -> None:
        self.tell(record)


def _start(work: _SealedWork, free_devices: Any, messages: Any, output: str, log_level: int) -> None:
    """Prepare a spawned process: device, threads, output, logs, and its end with that of the parent."""
    global _worker  # noqa: PLW0603
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends its children
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or none
            os.dup2(descriptor, stream.fileno())
    _LOGGER.addHandler(_LogSender(messages.put))
    _LOGGER.setLevel(log_level)
    _LOGGER.propagate = False
    _worker = _Worker(work, free_devices.get(), messages.put)
    _use(_worker.device)


def _use(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)  # kernels of other libraries ask for it
    else:
        torch.set_num_threads(1)


def _end_with(parent: BaseProcess) -> None:
    """End this process when the one that spawned it is gone, killed perhaps."""
    parent.join()
    os._exit(1)


def _call(task: Any) -> Any:
    assert _worker is not None
    return _worker.work.opened(task, _worker.device, _worker.tell)


def _obituary(code: int, output: str) -> str:
    """Say how a process ended, by its exit code (negative for a signal) and what all processes printed."""
    line = output.strip().rpartition("\n")[2].strip()
    if code < 0:
        how = f"by signal {signal.Signals(-code).name}"
        how += ", often for lack of memory" if code == -signal.SIGKILL else ""
    else:
        how = f"with exit code {code}" + (f" ({line})" if line else "")
    return (
        f"a process was ended {how}; run the same command again, with fewer --processes if memory is short: finished "
        "work is kept"
    )
