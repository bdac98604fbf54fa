"""What `torch.cuda` is on a machine with emulated GPUs, and generators, streams and events of them."""

from __future__ import annotations

import contextlib
import ctypes
import time
import types
from typing import Any

import torch

from emulation.emulator import tensor
from emulation.emulator.guard import DEVICES
from emulation.emulator.stats import STATS

MEMORY = 80 * 10**9
"""Of each GPU, bytes."""
CAPABILITY = (9, 0)


class Generator(torch.Generator):
    """`torch.Generator` that may be one of a GPU: same values, another device."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        self = super().__new__(cls)
        index = tensor.cuda_index(device)
        self.emulated_device = torch.device(device) if index is None else torch.device("cuda", index)
        return self

    def __init__(self, device: Any = "cpu") -> None: ...

    def manual_seed(self, seed: int) -> Generator:
        super().manual_seed(seed)
        return self

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.emulated_device


class Stream:
    """Does nothing: everything happens at once and in order."""

    def __init__(self, device: Any = None, **_: Any) -> None:
        self.device = torch.device("cuda", _index(device))
        self.cuda_stream, self.stream_id = 0, 0

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def wait_stream(self, _other: Any) -> None: ...
    def wait_event(self, _event: Any) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Event:
        return (event or Event()).record()


class Event:
    """Reads the host's clock."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.time = 0.0

    def record(self, _stream: Any = None) -> Event:
        self.time = time.perf_counter()
        return self

    def elapsed_time(self, other: Event) -> float:
        return (other.time - self.time) * 1000

    def synchronize(self) -> None: ...
    def wait(self, _stream: Any = None) -> None: ...
    def query(self) -> bool:
        return True


def _index(device: Any = None) -> int:
    """Of the GPU that a function of `torch.cuda` was asked about."""
    index = device if isinstance(device, int) else tensor.cuda_index("cuda" if device is None else device)
    if index is None or not 0 <= index < DEVICES:
        raise RuntimeError(f"CUDA error: invalid device ordinal (emulated; {device})")
    return index


def properties(device: Any = None) -> types.SimpleNamespace:
    """Return what `torch.cuda.get_device_properties` does."""
    major, minor = torch.cuda.get_device_capability(device)
    return types.SimpleNamespace(
        name=f"Emulated GPU {_index(device)}",
        total_memory=MEMORY,
        major=major,
        minor=minor,
        multi_processor_count=132,
    )


def _nothing(*_: Any, **__: Any) -> None: ...


def patch(guard: ctypes.CDLL) -> None:
    """Put the emulated functions in the place of those of `torch.cuda`, in which nothing works on a CPU build."""
    import torch._dynamo.trace_rules  # looks at the functions of torch.cuda, and must not see ours

    torch._dynamo.trace_rules.get_torch_obj_rule_map()
    torch.__future__.set_swap_module_params_on_conversion(True)
    tensor.current_device = guard.emulated_current_device

    def exchange(index: int) -> int:
        before: int = guard.emulated_current_device()
        if index >= 0:
            guard.emulated_set_device(_index(index))
        return before

    functions: dict[str, Any] = {
        "current_device": guard.emulated_current_device,
        "set_device": lambda device: exchange(_index(device)) and None,
        "_exchange_device": exchange,
        "_maybe_exchange_device": exchange,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: DEVICES,
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_properties": properties,
        "get_device_name": lambda device=None: properties(device).name,
        "mem_get_info": lambda device=None: (MEMORY - STATS.live[_index(device)], MEMORY),
        "memory_allocated": lambda device=None: STATS.live[_index(device)],
        "memory_reserved": lambda device=None: STATS.live[_index(device)],
        "max_memory_allocated": lambda device=None: STATS.peak[_index(device)],
        "max_memory_reserved": lambda device=None: STATS.peak[_index(device)],
        "reset_peak_memory_stats": lambda device=None: STATS.reset_peak(_index(device)),
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "current_stream": Stream,
        "default_stream": Stream,
        "stream": lambda stream: stream or contextlib.nullcontext(),
        "Stream": Stream,
        "Event": Event,
        "is_current_stream_capturing": lambda: False,
    }
    nothing = ("_lazy_init", "init", "synchronize", "empty_cache", "ipc_collect", "manual_seed", "manual_seed_all")
    functions |= dict.fromkeys((*nothing, "set_rng_state"), _nothing)
    for name, function in functions.items():
        setattr(torch.cuda, name, function)
    torch._C._host_emptyCache = _nothing  # only builds for CUDA have it
    torch.Generator = Generator  # type: ignore[misc]
    torch.backends.cuda.is_built = lambda: True  # type: ignore[attr-defined]
    from torch.optim import optimizer

    optimizer._foreach_supported_types.append(tensor.EmulatedTensor)  # foreach, as on a GPU
