"""Memory on the CPU that ops use again from call to call.

Pages that the operating system hands out anew cost, on first touch, about as much as the work that is done in them. So
each thread keeps a buffer for each use, as large as the largest call needed: 62 MiB in all for a model with 3072
channels, however many layers it has.

Example: take("sums", (4, 8), torch.int32) and, in the next call, take("sums", (2, 8), torch.int32) share their memory.
"""

import math
import threading

import torch
from torch import Tensor

_BUFFERS = threading.local()
"""Its attributes are one thread's: buffers by use."""


def release() -> None:
    """Let go of what this thread keeps; the next call of an op gets fresh memory."""
    vars(_BUFFERS).clear()


def take(use: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised contiguous tensor, valid until this thread takes the same use again.

    Tensors of different uses never overlap. What outlives the op must be copied out of it.
    """
    size = math.prod(shape) * dtype.itemsize
    buffers: dict[str, Tensor] = vars(_BUFFERS)
    buffer = buffers.get(use)
    if buffer is None or len(buffer) < size:
        with torch.inference_mode(False):  # what is made in that mode could not be written outside of it
            buffer = buffers[use] = torch.empty(size, dtype=torch.uint8, device="cpu")
    return buffer[:size].view(dtype).view(shape)
