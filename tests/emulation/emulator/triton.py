"""Triton's interpreter on emulated tensors: kernels really run, slowly, on the current device only."""

from __future__ import annotations

from typing import Any

import torch
from triton.runtime import interpreter

from emulation.emulator.stats import STATS
from emulation.emulator.tensor import EmulatedTensor, no_emulation


def _inner(value: Any) -> Any:
    if isinstance(value, EmulatedTensor):
        return value.inner
    return value.detach() if isinstance(value, torch.Tensor) else value


def patch() -> None:
    """Have launches of the interpreter take emulated tensors, and refuse what a launch on a GPU refuses."""
    launch = interpreter.GridExecutor.__call__

    def emulated_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        name = getattr(self.fn, "__name__", "?")
        on_device = [one for one in (*args, *kwargs.values()) if isinstance(one, EmulatedTensor)]
        if not on_device:
            return launch(self, *args, **kwargs)
        for one in (*args, *kwargs.values()):
            if isinstance(one, torch.Tensor) and not isinstance(one, EmulatedTensor):
                raise ValueError(f"{name}: Pointer argument cannot be accessed from Triton (cpu tensor?) (emulated)")
        current = torch.cuda.current_device()
        if {one.index for one in on_device} != {current}:
            raise RuntimeError(
                f"{name}: launched on cuda:{current} with tensors on "
                f"{', '.join(sorted({str(one.device) for one in on_device}))}: an illegal memory access was "
                "encountered (emulated)"
            )
        STATS.count(f"triton.{name}", is_kernel=True)
        with no_emulation():
            return launch(self, *map(_inner, args), **{name: _inner(one) for name, one in kwargs.items()})

    interpreter.GridExecutor.__call__ = emulated_launch
