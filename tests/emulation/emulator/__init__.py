"""Two emulated GPUs for builds of PyTorch that have none: `install_if_possible()` before torch is imported.

`EmulatedTensor` is a wrapper subclass: its device is cuda:0 or cuda:1 and `.is_cuda` is True; its values are in a CPU
tensor inside. A `TorchDispatchMode`, active in every thread, turns `device="cuda"`, `.to("cuda")` and `.cuda()` into
such tensors and runs every operator on what is inside. It is strict where CUDA is:

- an operator that gets tensors of several devices raises, except those that CUDA takes (0-dim CPU scalars in pointwise
  operators, CPU indices, copies);
- a generator of another type of device raises, as `torch.randn(device="cuda", generator=cpu_generator)` does;
- `.numpy()` of a GPU tensor raises;
- a Triton kernel runs on the current device of the thread, and raises if its tensors are on another;
- the backward pass runs in a thread of the autograd engine for each device (context variables of the caller are not set
  there), and optimizers take their foreach path, both as on a GPU.

`STATS` counts kernels, host synchronisations (`.item()`, `bool()`, `.cpu()`, boolean indexing) and copies to the device
with the line of s2q that asked for each, and live and peak bytes, which `torch.cuda.memory_allocated` and
`max_memory_allocated` return.

Not emulated: accelerate's sequential offload, operators in place that change a shape, torch.compile. What an emulated
GPU cannot show is in tests/emulation/README.md.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

from emulation.emulator.guard import DEVICES, GuardUnavailableError

__all__ = [
    "DEVICES",
    "ENVIRONMENT_VARIABLE",
    "install_if_possible",
    "is_installed",
    "obstacle",
    "paused",
    "use_references",
]

ENVIRONMENT_VARIABLE = "S2Q_EMULATED_GPUS"
"""The tests run on emulated GPUs where it is 1."""

_state: dict[str, str | None] = {}


def is_installed() -> bool:
    """Tell whether this process has emulated GPUs."""
    return "obstacle" in _state and _state["obstacle"] is None


def obstacle() -> str | None:
    """Say why GPUs are not emulated here although that was asked for; None if they are, or it was not."""
    return _state.get("obstacle")


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Plain PyTorch for a while in this thread, for what computes on the CPU."""
    if not is_installed():
        yield
        return
    from emulation.emulator import tensor

    with tensor.without_modes():
        yield


def install_if_possible() -> None:
    """Emulate from here on, in the whole process, unless there is an `obstacle`."""
    from emulation.emulator import guard

    try:
        library = guard.load()
    except GuardUnavailableError as error:
        _state["obstacle"] = str(error)
        return
    _state["obstacle"] = None
    os.environ["TRITON_INTERPRET"] = "1"
    from emulation.emulator import cuda, tensor

    cuda.patch(library)
    try:
        from emulation.emulator import triton
    except ImportError:  # s2q does not need triton
        pass
    else:
        triton.patch()
    tensor.start()


def use_references(
    put: Callable[[MutableMapping[str, Any], str, Any], None] = dict.__setitem__,
) -> None:
    """Put the references of the ops in Triton's place, whose interpreter takes minutes a block.

    Args:
        put: Sets an item of a table of backends; `monkeypatch.setitem` does so for a while.
    """
    from s2q.ops import activation_path, attention_colsum, fake_quantize, rescaled_int_matmul, weight_only_matmul

    for op in (activation_path, attention_colsum, fake_quantize, rescaled_int_matmul, weight_only_matmul):
        put(op.BACKENDS, "triton", op.BACKENDS["reference"])
