"""Devices: checks of their names before any work, the dtypes that they compute in, their memory."""

import contextlib
import gc
import logging
import os
import re
import resource
import sys
from pathlib import Path

import torch

from s2q.common.device_names import is_device_name, kind_of_device
from s2q.common.errors import InvalidInputError, ResourceError
from s2q.common.log import log_once
from s2q.common.processor import has_arithmetic

logger = logging.getLogger(__name__)

_BF16_CAPABILITY = (8, 0)
"""Least compute capability of NVIDIA's GPUs with bf16 products."""
_STATUS, _CLEAR_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def check_device(device: str | torch.device) -> None:
    """Check that this machine and this build of PyTorch have a device, "cpu", "cuda" or "cuda:N"."""
    name = str(device)
    if not is_device_name(name):
        raise InvalidInputError(f"device={name!r} is {kind_of_device(name) or 'unknown'}; use cpu, cuda or cuda:N")
    if name == "cpu":
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count and torch.version.cuda is None and torch.version.hip is None:
        raise ResourceError(
            f"device={name!r}: PyTorch {torch.__version__} is built for CPUs only; install a build for CUDA "
            "(https://pytorch.org/get-started), or use cpu"
        )
    if not count:
        raise ResourceError(
            f"device={name!r}: PyTorch finds no GPU; check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES, or use cpu"
        )
    if int(name.partition(":")[2] or 0) >= count:
        there = ", ".join(f"cuda:{index}" for index in range(count))
        raise ResourceError(f"device={name!r}: this machine has {there}; use one of these, or cpu")


def emulated_dtypes(device: str | torch.device) -> tuple[torch.dtype, ...]:
    """Return the dtypes of half precision that a device emulates; none on a GPU."""
    if torch.device(device).type != "cpu":
        return ()
    return tuple(dtype for dtype in (torch.bfloat16, torch.float16) if not has_arithmetic(dtype))


def default_dtype(stored: torch.dtype, device: str | torch.device) -> torch.dtype:
    """Return the default compute dtype of a model: the stored one, or float32 where the device emulates that.

    A CPU without instructions for half precision multiplies it 4 to 13 times as slowly as fp32. The first choice of
    float32 is logged.
    """
    if stored not in emulated_dtypes(device):
        return stored
    message = "computing in float32: this CPU has no %s arithmetic; --dtype %s (dtype=) emulates it"
    log_once(logger, logging.INFO, message, *2 * (str(stored).removeprefix("torch."),))
    return torch.float32


def has_bf16_products(device: str | torch.device) -> bool:
    """Return whether a device is a GPU that multiplies bf16; AMD's are taken to do so, and those that are not here."""
    kind, index = torch.device(device).type, torch.device(device).index or 0
    if kind == "cpu" or torch.version.hip is not None:
        return kind != "cpu"
    there = torch.cuda.is_available() and index < torch.cuda.device_count()
    return not there or torch.cuda.get_device_capability(index) >= _BF16_CAPABILITY


def overflow_remedy(dtype: torch.dtype) -> str:
    """Return what to do about values that are not finite in a model of a dtype, to end an error message with."""
    if dtype == torch.float16:
        return "float16 overflows above 65,504; use --dtype bfloat16 (dtype=)"
    return "check the model and its dtype"


def host_memory_bytes() -> int:
    """Return the memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def device_memory_bytes(device: str | torch.device) -> int | None:
    """Return the memory of a device, the machine's for a CPU; None if the device is not here."""
    if torch.device(device).type == "cpu":
        return host_memory_bytes()
    return torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else None


def free_memory() -> None:
    """Release models that nothing refers to any more, and return what PyTorch keeps of GPU memory to the device."""
    gc.collect()  # modules with hooks are in cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reset_peak_memory(device: str | torch.device) -> bool:
    """Reset `peak_memory_bytes`, to measure one run; return whether that was possible: on a CPU only Linux can."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR_PEAK.write_text("5")
    except OSError:
        return False
    return True


def peak_memory_bytes(device: str | torch.device) -> int:
    """Return the highest memory use since `reset_peak_memory`: allocated on a GPU, else resident in this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = _resident("VmHWM")
    return lifetime_peak_bytes() if peak is None else peak


def lifetime_peak_bytes() -> int:
    """Return the most memory that was resident in this process since it was started, which nothing resets."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int | None:
    """Return the memory of this process that is resident now; None where the system is not Linux."""
    return _resident("VmRSS")


def _resident(field: str) -> int | None:
    with contextlib.suppress(OSError):
        if match := re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), flags=re.MULTILINE):
            return int(match[1]) * 1024
    return None
