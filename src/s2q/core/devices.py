"""Which devices there are, asked before any work so that a wrong name is one clear line; their dtypes and memory."""

import functools
import gc
import logging
import re

import torch

from s2q.core.errors import InvalidInputError, ResourceError
from s2q.core.processor import has_arithmetic

logger = logging.getLogger(__name__)

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


def emulated_dtypes(device: str | torch.device) -> tuple[torch.dtype, ...]:
    """Return the dtypes of half precision that a device emulates; none on a GPU.

    Args:
        device: Where a model computes.
    """
    if torch.device(device).type != "cpu":
        return ()
    return tuple(dtype for dtype in (torch.bfloat16, torch.float16) if not has_arithmetic(dtype))


def default_dtype(stored: torch.dtype, device: str | torch.device) -> torch.dtype:
    """Return the dtype that a model computes in where nobody chose one: the stored one, unless the device emulates it.

    A CPU multiplies half precision that it has no instructions for 4 to 13 times as slowly as fp32, which is what it
    computes in then; the first time, this is logged.

    Args:
        stored: What the model is stored in, or was quantized in.
        device: Where it computes.
    """
    if stored not in emulated_dtypes(device):
        return stored
    _log_wide(str(stored).removeprefix("torch."))
    return torch.float32


@functools.cache
def _log_wide(stored: str) -> None:
    logger.info("computing in float32: this CPU has no %s arithmetic; --dtype %s (dtype=) emulates it", stored, stored)


def free_memory() -> None:
    """Release models that nothing refers to any more, and return what PyTorch keeps of GPU memory to the device."""
    gc.collect()  # modules with hooks are in cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
