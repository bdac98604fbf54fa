"""Which devices there are, asked before any work so that a wrong name is one clear line; and their memory."""

import gc
import re

import torch

from s2q.core.errors import InvalidInputError, ResourceError

_NAMES = re.compile(r"cpu|cuda(:\d+)?")


def check_device(device: str | torch.device) -> None:
    """Check that this machine and this build of PyTorch have a device.

    Args:
        device: "cpu", "cuda" or "cuda:N", or the `torch.device` of that name.

    Raises:
        InvalidInputError: If the name is none of these.
        ResourceError: If there is no such GPU.
    """
    name = str(device)
    if not _NAMES.fullmatch(name):
        raise InvalidInputError(f"device={name!r} is unknown; use cpu, cuda or cuda:N")
    if name == "cpu":
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise ResourceError(f"device={name!r}: this machine or this build of PyTorch has no CUDA device; use cpu")
    if int(name.partition(":")[2] or 0) >= count:
        raise ResourceError(f"device={name!r}: this machine has {count} CUDA devices; use cuda:{count - 1}")


def free_memory() -> None:
    """Release models that nothing refers to any more, and return what PyTorch keeps of GPU memory to the device."""
    gc.collect()  # modules with hooks are in cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
