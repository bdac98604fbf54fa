"""Independent tasks, run by workers that claim one task at a time, so no worker waits for a slower one.

Work is a callable `work(task, worker)`, sent to each worker once, which may keep what it loads from task to task. If it
has a method `close`, a worker calls that before other work takes its place. A worker on a CPU computes in one thread,
whatever the engine, so that sums are the same for any number of workers.

Example: dict(engine.map(work, tasks)) has work(task, worker) by the index of each task.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch

from s2q.common.errors import ResourceError

Tell = Callable[[Any], None]
"""Called in a worker with a message for the caller; any picklable value."""

ATTEMPTS = 3
"""Workers that a task may lose before the run ends."""

REMEDY = "run the same command again, with fewer --workers if memory is short: finished work is kept"

_POLL_SECONDS = 0.1
_Task = TypeVar("_Task")
_Result = TypeVar("_Result")
_T = TypeVar("_T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Worker:
    """A worker as its tasks see it: its device, its channel to the caller, and what tasks keep for later ones."""

    device: str
    tell: Tell
    _kept: dict[str, Any] = field(default_factory=dict)

    def keep(self, name: str, make: Callable[[], _T]) -> _T:
        """Return what is kept under a name, made by the first task that asks for it."""
        if name not in self._kept:
            self._kept[name] = make()
        value: _T = self._kept[name]
        return value

    def kept(self, name: str) -> Any:
        """Return what is kept under a name; None if nothing is."""
        return self._kept.get(name)

    def put(self, name: str, value: Any) -> None:
        """Keep a value under a name."""
        self._kept[name] = value


@dataclass(frozen=True, kw_only=True)
class Retry:
    """A task whose worker died: its index, and how the worker ended; it was given to another worker."""

    task: int
    cause: str


Work = Callable[[_Task, Worker], _Result]


class Engine(Protocol):
    """Runs tasks.

    Attributes:
        devices: The device of each worker.
        retries: Tasks that were given to another worker, in the order of their loss.
    """

    devices: Sequence[str]
    retries: list[Retry]

    def map(
        self, work: Work[_Task, _Result], tasks: Iterable[_Task], *, on_message: Tell = ...
    ) -> Generator[tuple[int, _Result], None, None]:
        """Like `concurrent.futures.Executor.map`, with tasks drawn one at a time and results in the order they end.

        An iterator that is closed early, and an error of a task, end all workers.
        """

    def offer(self, name: str, value: Any) -> None:
        """Let tasks of this process `keep` what is loaded already; other processes load their own."""

    def close(self) -> None:
        """End the workers."""


class InProcessEngine:
    """Runs tasks in this process, one after the other."""

    def __init__(self, device: str) -> None:
        self.devices: Sequence[str] = [device]
        self.retries: list[Retry] = []
        self._kept: dict[str, Any] = {}

    def map(
        self, work: Work[_Task, _Result], tasks: Iterable[_Task], *, on_message: Tell = lambda message: None
    ) -> Generator[tuple[int, _Result], None, None]:
        """See `Engine.map`."""
        worker = Worker(device=self.devices[0], tell=on_message, _kept=self._kept)
        try:
            for index, task in enumerate(tasks):
                yield index, work(task, worker)
        finally:
            close_work(work)

    def offer(self, name: str, value: Any) -> None:
        """See `Engine.offer`."""
        self._kept[name] = value

    def close(self) -> None:
        """Release what tasks kept."""
        self._kept.clear()


class LostWorkerError(ResourceError):
    """A worker died; the text says how it ended."""


class Slot(Protocol):
    """The place of one worker of a `WorkerEngine`."""

    def start(self) -> Future[Any]:
        """Start a worker, in place of the one before; the future ends when it takes tasks, or with LostWorkerError."""

    def submit(self, work: Any, token: int, task: Any) -> Future[Any]:
        """Give a task to the worker; raises LostWorkerError in the future if it dies. A token names a work."""

    def messages(self) -> Iterator[Any]:
        """Return the messages that have arrived."""

    def kill(self) -> None:
        """End the worker at once."""


class WorkerEngine:
    """Runs tasks in workers that can die: the task of a dead one is given to another, `ATTEMPTS` times at most."""

    def __init__(self, devices: Sequence[str], slots: Sequence[Slot]) -> None:
        self.devices = devices
        self.retries: list[Retry] = []
        self._slots = slots
        self._works = 0
        self._lost_at_start = 0
        self._starting: dict[Future[Any], Slot] = {}
        try:
            for slot in slots:
                self._starting[slot.start()] = slot
        except BaseException:
            self.close()
            raise

    def map(
        self, work: Work[_Task, _Result], tasks: Iterable[_Task], *, on_message: Tell = lambda message: None
    ) -> Generator[tuple[int, _Result], None, None]:
        """See `Engine.map`; the work is sent to every worker, and must be picklable."""
        self._works += 1
        sealed, token = self.seal(work), self._works
        waiting, lost = _Tasks(tasks), Counter[int]()
        running: dict[Future[_Result], tuple[Slot, int, _Task]] = {}
        idle = deque(slot for slot in self._slots if slot not in self._starting.values())
        try:
            while True:
                while idle and waiting.are_left():
                    slot, (index, task) = idle.popleft(), waiting.claim()
                    running[slot.submit(sealed, token, task)] = slot, index, task
                if not running and not waiting.are_left():
                    return
                done, _ = wait([*running, *self._starting], timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
                self._pass_on(on_message)
                self.check(waits=not running)
                for future in done:
                    if future in self._starting:
                        idle += self._started(future)
                        continue
                    slot, index, task = running.pop(future)
                    try:
                        result = future.result()
                    except LostWorkerError as error:
                        lost[index] += 1
                        self._record(index, error, times=lost[index])
                        waiting.give_back(index, task)
                        self._starting[slot.start()] = slot
                    else:
                        idle.append(slot)
                        yield index, result
        except BaseException:
            self.close()
            raise

    def offer(self, name: str, value: Any) -> None:
        """See `Engine.offer`."""

    def check(self, *, waits: bool) -> None:
        """Look after the workers, some times a second; `waits` is whether all of them are still starting."""

    def seal(self, work: Any) -> Any:
        """Return work in the form in which it is sent."""
        return work

    def close(self) -> None:
        """End the workers."""
        for slot in self._slots:
            slot.kill()

    def _started(self, future: Future[Any]) -> list[Slot]:
        """Return the worker that has started; one that was lost meanwhile is started again."""
        slot = self._starting.pop(future)
        try:
            future.result()
        except LostWorkerError as error:
            self._lost_at_start += 1
            if self._lost_at_start >= ATTEMPTS * len(self._slots):
                raise ResourceError(f"{error}, {self._lost_at_start} times while workers started; {REMEDY}") from error
            logger.warning("%s while it started; another one is started", error)
            self._starting[slot.start()] = slot
            return []
        return [slot]

    def _record(self, index: int, error: LostWorkerError, *, times: int) -> None:
        if times >= ATTEMPTS:
            raise ResourceError(f"{error}, {times} times in the same task; {REMEDY}") from error
        logger.warning("%s; its task is given to another worker", error)
        self.retries.append(Retry(task=index, cause=str(error)))

    def _pass_on(self, on_message: Tell) -> None:
        for slot in self._slots:
            for message in slot.messages():
                if isinstance(message, logging.LogRecord):
                    logging.getLogger(message.name).handle(message)
                else:
                    on_message(message)


class _Tasks(Generic[_Task]):
    """Tasks with their indices, drawn when a worker is free; those of dead workers come first."""

    def __init__(self, tasks: Iterable[_Task]) -> None:
        self._upcoming = enumerate(tasks)
        self._drawn: deque[tuple[int, _Task]] = deque()

    def are_left(self) -> bool:
        if not self._drawn:
            self._drawn.extend(itertools.islice(self._upcoming, 1))
        return bool(self._drawn)

    def claim(self) -> tuple[int, _Task]:
        return self._drawn.popleft()

    def give_back(self, index: int, task: _Task) -> None:
        self._drawn.appendleft((index, task))


def close_work(work: Any) -> None:
    """Have work release what it keeps."""
    if work is not None and hasattr(work, "close"):
        work.close()


@contextmanager
def fixed_threads(device: str) -> Iterator[None]:
    """Compute in one thread on a CPU, as every worker does; the caller's number of threads is restored."""
    if torch.device(device).type != "cpu":
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
