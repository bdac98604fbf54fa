"""Workers on a Ray cluster: actors that take one GPU each, or one core where the device is the CPU.

The run folder and the model's files must be on storage that all nodes mount; workers check it as they start. A worker
that dies with its node is started again wherever the cluster has room.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from s2q.common.errors import InvalidInputError, ResourceError, S2QError, UsageError, first_line
from s2q.common.versions import is_installed, package_versions
from s2q.engines.engine import LostWorkerError, WorkerEngine
from s2q.engines.workers import LOGGER, SealedWork, WorkerLoop, prepare, sendable, warm_up

logger = logging.getLogger(__name__)

_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 60.0
_MESSAGE_SECONDS = 1.0
_CHECK_SECONDS = 2.0
_HEAD_SECONDS = 10.0
_ROOM_SECONDS = 30.0
_MESSAGES = "messages"
_JOINED: list[str] = []  # the address by which this program has joined its cluster: Ray knows it by another


def connect(address: str | None) -> None:
    """Join a Ray cluster ("HOST:PORT", "auto"); for None that of RAY_ADDRESS, or start Ray on this machine.

    Raises:
        UsageError: If Ray is not installed, or this program has joined another cluster.
        ResourceError: If no cluster answers at the address.
    """
    if not is_installed("ray"):
        raise UsageError("--engine ray: Ray is not installed; pip install 's2q[ray]', or use --engine processes")
    import ray

    if ray.is_initialized():
        joined = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", *_JOINED) and not _are_same(address, joined):
            raise UsageError(f"--ray-address {address}: this program has joined {joined}; use one cluster a program")
        return
    joined = address or os.environ.get("RAY_ADDRESS") or "local"
    if joined != "local":
        _check_answers(joined)
    try:
        ray.init(address=joined, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        if joined == "local":
            raise ResourceError(f"--engine ray: Ray cannot be started ({why}); use --engine processes") from error
        raise ResourceError(f"--ray-address {joined}: cannot be joined ({why}); check the address") from error
    _JOINED[:] = [joined]


def _are_same(address: str, other: str) -> bool:
    """Whether two addresses, HOST:PORT, have the same port and the same numbers for their hosts."""
    places = [address.rpartition(":")[::2] for address in (address, other)]
    with contextlib.suppress(OSError):
        places = [(socket.gethostbyname(host), port) for host, port in places]
    return places[0] == places[1]


def _check_answers(address: str) -> None:
    """Ask a cluster for its status, in a process that can be ended: `ray.init` waits minutes for one that is gone."""
    remedy = "start one with `ray start --head`, or omit the address to use this machine"
    if address != "auto" and not _answers(address):
        raise ResourceError(f"--ray-address {address}: nothing answers; {remedy}")
    where = [] if address == "auto" else ["--address", address]
    command = [sys.executable, "-m", "ray.scripts.scripts", "status", *where]
    try:
        subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=_ANSWER_SECONDS)
    except subprocess.SubprocessError as error:
        raise ResourceError(f"--ray-address {address}: no Ray cluster answers; {remedy}") from error


def _answers(address: str) -> bool:
    """Whether something listens at an address, HOST:PORT."""
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError, ValueError):
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
        return True
    return False


def leave(code: int) -> None:
    """Leave the cluster before the program ends, for which Ray would wait where the head is gone."""
    import ray

    leaving = threading.Thread(target=ray.shutdown, daemon=True)
    leaving.start()
    leaving.join(_HEAD_SECONDS)
    if leaving.is_alive():
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def capacity(device: str) -> int:
    """Return how many workers the connected cluster has room for; raises ResourceError for none."""
    import ray

    count = int(ray.cluster_resources().get(_resource(device), 0))
    if count == 0:
        raise ResourceError(
            f"--engine ray: no node of the cluster has a {_resource(device)}; give --workers N if nodes join later"
        )
    return count


def workers_per_node(device: str) -> int:
    """Return the most workers that one node of the connected cluster has room for."""
    import ray

    return max(int(node["Resources"].get(_resource(device), 0)) for node in ray.nodes() if node["Alive"])


def _resource(device: str) -> str:
    return "CPU" if device == "cpu" else "GPU"


def _defect(error: BaseException | None) -> str:
    """Return the last line of an error of a worker's own code, which would come again; "" where it was lost."""
    from ray.exceptions import RayActorError, RayTaskError

    is_raised = isinstance(error, RayTaskError) or (isinstance(error, RayActorError) and error.actor_init_failed)
    return str(error).strip().rpartition("\n")[2].strip() if is_raised else ""


class RayEngine(WorkerEngine):
    """Runs tasks in actors of the connected cluster, `workers` of them; `shared` is a folder that all must see."""

    def __init__(self, device: str, workers: int, *, modules: Sequence[str] = (), shared: Path | None = None) -> None:
        import ray

        device = torch.device(device).type  # Ray shows a worker the GPU that it assigns, and no other
        cpus, gpus = (1, 0) if device == "cpu" else (0, 1)
        resources = {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": "SPREAD"}  # memory is that of a node
        actor = ray.remote(concurrency_groups={_MESSAGES: 1}, **resources)(_Actor)
        options = {"device": device, "modules": tuple(modules), "shared": None if shared is None else str(shared)}
        options["current"] = os.getcwd()
        self._head, self._resource = ray.get_runtime_context().gcs_address, _resource(device)
        self._next_check = self._waits_since = time.monotonic()
        self._silent_since: float | None = None
        self._is_gone = False
        super().__init__([device] * workers, [_RaySlot(actor, options) for _ in range(workers)])

    def check(self, *, waits: bool) -> None:
        """Raise ResourceError where the head is gone; log a warning while the cluster has no room for a worker."""
        now = time.monotonic()
        if now < self._next_check:
            return
        self._next_check = now + _CHECK_SECONDS
        if _answers(self._head):
            self._silent_since = None
        elif self._silent_since is None:
            self._silent_since = now
        elif now - self._silent_since > _HEAD_SECONDS:
            self._is_gone = True
            raise ResourceError(
                f"the head of the Ray cluster at {self._head} does not answer any more; run the same command again "
                "when there is a cluster: finished work is kept"
            )
        if not waits:
            self._waits_since = now
        elif now - self._waits_since > _ROOM_SECONDS:
            self._waits_since = now
            logger.warning("waiting for the Ray cluster to have room for a worker (one %s each)", self._resource)

    def close(self) -> None:
        """End the workers, except where the head is gone: what it started ends with it."""
        if not self._is_gone:
            super().close()

    def seal(self, work: Any) -> Any:
        """Put work into the object store, from which every node reads it once."""
        import ray

        return ray.put(SealedWork(work))


class _RaySlot:
    def __init__(self, actor: Any, options: dict[str, Any]) -> None:
        self._actor, self._options = actor, options
        self._handle: Any = None

    def start(self) -> Future[Any]:
        self._handle = self._actor.remote(log_level=LOGGER.getEffectiveLevel(), **self._options)
        self._token = 0
        self._arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._listen(self._handle)
        return self._watched(self._handle.ready.remote(), open_result=self._checked)

    def submit(self, work: Any, token: int, task: Any) -> Future[Any]:
        sealed = work if token != self._token else None
        self._token = token
        return self._watched(self._handle.run.remote(sealed, token, task), open_result=self._opened)

    def messages(self) -> Iterator[Any]:
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._arrived.get_nowait()

    def kill(self) -> None:
        import ray

        if self._handle is not None and ray.is_initialized():
            ray.kill(self._handle)

    def _listen(self, handle: Any) -> None:
        """Ask for messages, and again when they have come, until the worker is gone."""

        def arrived(done: Future[Any]) -> None:
            if done.cancelled() or done.exception() is not None:
                return
            for message in done.result():
                self._arrived.put(message)
            if handle is self._handle:
                self._listen(handle)

        handle.messages.options(concurrency_group=_MESSAGES).remote().future().add_done_callback(arrived)

    def _watched(self, reference: Any, *, open_result: Callable[[Any], Any]) -> Future[Any]:
        """Return the future of a call that raises LostWorkerError where the worker or its node died."""
        watched: Future[Any] = Future()

        def settle(done: Future[Any]) -> None:
            error = done.exception()
            if defect := _defect(error):
                watched.set_exception(
                    S2QError(
                        f"a worker of the Ray cluster failed ({defect}); check that all nodes have the same packages"
                    )
                )
                return
            if error is not None:
                watched.set_exception(LostWorkerError(f"a worker of the Ray cluster was lost ({first_line(error)})"))
                return
            try:
                watched.set_result(open_result(done.result()))
            except Exception as refused:
                watched.set_exception(refused)

        reference.future().add_done_callback(settle)
        return watched

    def _checked(self, start: _Start) -> None:
        """Refuse a worker of other versions, and one that does not see the run folder."""
        ours = package_versions()
        differing = [name for name, version in ours.items() if start.versions.get(name) != version]
        if differing:
            theirs = ", ".join(f"{name} {start.versions.get(name)} (here {ours[name]})" for name in differing)
            raise InvalidInputError(
                f"Ray node {start.node} has other versions: {theirs}; results depend on them, install the same on all "
                "nodes"
            )
        if not start.sees:
            raise InvalidInputError(
                f"Ray node {start.node} does not see {self._options['shared']}; put the output on storage that all "
                "nodes mount at the same place"
            )

    def _opened(self, outcome: _Outcome) -> Any:
        for message in outcome.messages:
            self._arrived.put(message)
        if outcome.error is not None:
            raise outcome.error
        return outcome.result


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """The end of a task, with the messages that were not fetched before it."""

    result: Any = None
    error: Exception | None = None
    messages: Sequence[Any] = ()


class _Actor:
    """A worker in the cluster."""

    def __init__(self, device: str, modules: Sequence[str], shared: str | None, current: str, log_level: int) -> None:
        with contextlib.suppress(OSError):  # paths relative to the caller's folder mean the same here, if it is shared
            os.chdir(current)
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._device, self._modules, self._shared, self._log_level = device, modules, shared, log_level
        self._loop = WorkerLoop(device, self._messages.put)

    def ready(self) -> _Start:
        """Import what tasks need; return what the caller checks before it sends any."""
        versions = warm_up(self._modules)
        return _Start(
            node=socket.gethostname(), versions=versions, sees=not self._shared or Path(self._shared).is_dir()
        )

    def run(self, sealed: Any, token: int, task: Any) -> _Outcome:
        """Return the outcome of a task."""
        prepare(self._device, self._messages.put, self._log_level)  # threads are a setting of the thread that computes
        try:
            result = self._loop.run(sealed, token, task)
        except Exception as error:
            return _Outcome(error=sendable(error), messages=self._waiting())
        return _Outcome(result=result, messages=self._waiting())

    def messages(self) -> list[Any]:
        """Wait for messages, a second at most."""
        with contextlib.suppress(queue.Empty):
            return [self._messages.get(timeout=_MESSAGE_SECONDS), *self._waiting()]
        return []

    def _waiting(self) -> list[Any]:
        waiting: list[Any] = []
        with contextlib.suppress(queue.Empty):
            while True:
                waiting.append(self._messages.get_nowait())
        return waiting


@dataclass(frozen=True, kw_only=True)
class _Start:
    """A worker that has started: its node, its versions, and whether it sees the shared folder."""

    node: str
    versions: Mapping[str, str | None]
    sees: bool
