"""A worker's side of an engine: it opens the work that it is sent, and sends back messages and log records."""

import functools
import importlib
import logging
import logging.handlers
import queue
from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch

from s2q.common.errors import S2QError, first_line
from s2q.common.versions import package_versions
from s2q.engines.engine import Tell, Work, Worker, close_work

LOGGER = logging.getLogger("s2q")


class SealedWork:
    """Work on the way to a worker, which opens it with its first task: there an error reaches the caller."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def __reduce__(self) -> tuple[Any, ...]:
        return SealedWork, (self.packed,)

    @functools.cached_property
    def packed(self) -> bytes:
        """The bytes that are sent, made once for all workers."""
        return self.content if isinstance(self.content, bytes) else bytes(ForkingPickler.dumps(self.content))

    def open(self) -> Any:
        """Return the work; raises S2QError where this process cannot import it."""
        try:
            return ForkingPickler.loads(self.packed)
        except (AttributeError, ImportError) as error:
            raise S2QError(
                f"a worker cannot load its work ({first_line(error)}); define it in a module that can be imported, "
                "not in a notebook or script, or use one worker"
            ) from error


class WorkerLoop:
    """Runs tasks in a worker; the work is sent with the first of its tasks only."""

    def __init__(self, device: str, tell: Tell) -> None:
        self.worker = Worker(device=device, tell=tell)
        self._token = 0
        self._work: Any = None

    def run(self, sealed: SealedWork | None, token: int, task: Any) -> Any:
        """Return what the work makes of a task."""
        if token != self._token:
            assert sealed is not None
            close_work(self._work)
            self._work, self._token = sealed.open(), token
        work: Work[Any, Any] = self._work
        return work(task, self.worker)


class LogSender(logging.handlers.QueueHandler):
    """Sends log records as messages."""

    def __init__(self, tell: Tell) -> None:
        super().__init__(queue.SimpleQueue())
        self.tell = tell

    def enqueue(self, record: logging.LogRecord) -> None:
        """Send a record."""
        self.tell(record)


def prepare(device: str, tell: Tell, log_level: int) -> None:
    """Set up device, threads and logs of a worker."""
    LOGGER.handlers[:] = [LogSender(tell)]
    LOGGER.setLevel(log_level)
    LOGGER.propagate = False
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)  # kernels of other libraries ask for it
    else:
        torch.set_num_threads(1)


def sendable(error: Exception) -> Exception:
    """Return an error that can be pickled, without its causes."""
    try:
        ForkingPickler.loads(ForkingPickler.dumps(error))
    except Exception:
        return S2QError(f"{type(error).__name__}: {error}")
    return error


def warm_up(modules: Sequence[str]) -> dict[str, str | None]:
    """Import what tasks will need; return the versions of this worker's packages."""
    for module in modules:
        importlib.import_module(module)
    return package_versions()
