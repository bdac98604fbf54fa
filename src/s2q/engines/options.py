"""Options that say where independent tasks run, as every verb that has such tasks takes them."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from s2q.common import arguments
from s2q.common.errors import InvalidInputError, UsageError, short_repr, unknown_name
from s2q.engines.engine import Engine, InProcessEngine
from s2q.engines.processes import ProcessEngine

logger = logging.getLogger(__name__)

AUTO = "auto"
ENGINES = ("processes", "ray")
_ADDRESS = re.compile(r"auto|(?!ray://)[^\s:]\S*:\d+")


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Workers of a run: how many, on which devices, in which engine.

    Attributes:
        devices: Names of the devices, of one kind, that workers take in turn; "cuda" is the current GPU.
        are_named: Whether the user named the devices.
        count: Number of workers; None takes every visible GPU, or a process for each core of a CPU.
        engine: "processes" (of this machine; this process where one worker is enough) or "ray".
        ray_address: Address of the cluster; None takes that of RAY_ADDRESS, or starts Ray on this machine.
    """

    devices: tuple[str, ...] = ("cpu",)
    are_named: bool = False
    count: int | None = None
    engine: str = "processes"
    ray_address: str | None = None

    @property
    def device(self) -> str:
        """The device on which this process computes what is not distributed."""
        return self.devices[0]

    @property
    def is_cpu(self) -> bool:
        """Whether workers compute on the CPU."""
        return self.device == "cpu"

    def check_alone(self, verb: str) -> None:
        """Refuse several workers, several named devices and Ray for a loaded pipeline, which stays in this process."""
        given = [
            *([f"workers={self.count}"] if (self.count or 1) > 1 else []),
            *([f"devices={','.join(self.devices)}"] if self.are_named and len(self.devices) > 1 else []),
            *([f"engine={self.engine!r}"] if self.engine != "processes" else []),
        ]
        if given:
            raise UsageError(
                f"{verb}: got {given[0]} and a loaded pipeline; pass the name or folder of the model, which every "
                "worker loads"
            )

    def planned(self, tasks: int, *, most: int | None = None) -> int:
        """Return the number of workers for a number of tasks; `most` limits a number that the user left open."""
        if self.count is not None:
            if self.count > tasks:
                logger.warning("got %d workers for %d tasks; %d are used", self.count, tasks, tasks)
            return max(1, min(self.count, tasks))
        if self.engine == "ray":
            from s2q.engines.ray_cluster import capacity

            available = capacity(self.device)
        else:
            available = cpu_count() if self.is_cpu else len(self.devices)
        return max(1, min(available, tasks, most or tasks))

    def on_one_machine(self, workers: int) -> int:
        """Return how many of several workers share the memory of a machine at most."""
        if self.engine == "ray":
            from s2q.engines.ray_cluster import workers_per_node

            return min(workers, max(1, workers_per_node(self.device)))
        return workers

    @property
    def on_one_gpu(self) -> int:
        """The most workers on one GPU: by default, and in Ray, each has another one."""
        return 1 if self.is_cpu else self.on_one_device(self.count or 1)

    def on_one_device(self, workers: int) -> int:
        """Return how many of several workers share a device at most."""
        if self.engine == "ray":
            return self.on_one_machine(workers) if self.is_cpu else 1
        return max(Counter(self._devices_of(workers)).values())

    def open(self, workers: int, *, modules: Sequence[str] = (), shared: Path | None = None) -> Engine:
        """Start the workers; close the engine when it is no longer needed.

        Args:
            modules: Imported by new processes while they wait for their first task.
            shared: A folder that all workers must see.
        """
        if self.engine == "ray":
            from s2q.engines.ray_cluster import RayEngine

            return RayEngine(self.device, workers, modules=modules, shared=shared)
        if workers == 1:
            return InProcessEngine(self.device)
        return ProcessEngine(self._devices_of(workers), modules=modules)

    def _devices_of(self, workers: int) -> list[str]:
        return [self.devices[index % len(self.devices)] for index in range(workers)]


def workers_argument(
    *,
    workers: int | str,
    devices: Sequence[str] | None,
    device: str | torch.device | int,
    engine: str,
    ray_address: str | None,
) -> Workers:
    """Check the options of a verb; a cluster is joined, so that a dead address ends the run before any compute.

    Raises:
        UsageError: If options contradict each other, or Ray is not installed.
        InvalidInputError: If a value is none of those that an option takes.
        ResourceError: If a device is not there, or the cluster does not answer.
    """
    count = None if workers == AUTO else arguments.whole_number("workers", workers, least=1)
    if engine not in ENGINES:
        raise unknown_name("engine", engine, ENGINES)
    if devices is not None and engine == "ray":
        raise UsageError("devices (--devices): Ray assigns GPUs itself; remove it, or use the engine processes")
    if ray_address is not None and engine != "ray":
        raise UsageError("ray_address (--ray-address): is for the engine ray; add --engine ray, or remove it")
    names = _device_names(devices, device)
    if engine == "ray":
        from s2q.engines.ray_cluster import connect

        if ray_address is not None and not (isinstance(ray_address, str) and _ADDRESS.fullmatch(ray_address)):
            raise InvalidInputError(f"ray_address: got {short_repr(ray_address)}; expected HOST:PORT or auto")
        connect(ray_address)
    elif devices is None and names == ("cuda",) and count != 1 and gpu_count() > 1:
        names = tuple(f"cuda:{index}" for index in range(gpu_count()))
    return Workers(devices=names, are_named=devices is not None, count=count, engine=engine, ray_address=ray_address)


def _device_names(devices: Sequence[str] | None, device: str | torch.device | int) -> tuple[str, ...]:
    if devices is None:
        return (arguments.device_name(device),)
    names = tuple(arguments.device_name(name) for name in arguments.name_list("devices", devices))
    if not names:
        raise InvalidInputError("devices: got none; name at least one, such as cuda:0")
    kinds = sorted({torch.device(name).type for name in names})
    if len(kinds) > 1:
        raise InvalidInputError(
            f"devices: got {', '.join(names)}; results differ between kinds of devices, name one kind"
        )
    return names


def gpu_count() -> int:
    """Return the number of visible GPUs."""
    return torch.cuda.device_count()


def cpu_count() -> int:
    """Return the number of CPU cores that this process may use: its affinity, and the quota of its control groups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cores, _cpu_quota(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")))))


def _cpu_quota(root: Path, membership: Path) -> float:
    """Return the least CPU quota, in cores, of this process's control group (version 2) and those above it."""
    try:
        line = next(line for line in membership.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return math.inf
    least, folder = math.inf, root / line.removeprefix("0::").lstrip("/")
    for group in (folder, *folder.parents):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            quota, period = (group / "cpu.max").read_text().split()
            least = min(least, float(quota) / float(period))
        if group == root:
            break
    return least
