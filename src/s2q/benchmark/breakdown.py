"""Time of a call by part: integer and floating-point products, activation path, attention, norms, the rest.

The call runs once under torch.profiler, with named ranges around the linears, around the norms, and around what a
packed linear prepares its input with. Every operator's own time counts for the innermost range that it is in;
attention is recognised by the name of its operator. What is left of a linear's range (product, scales, bias, unpacking
of the weight) is `gemm`. On a GPU the times are those of the kernels that an operator launched.

The profiler slows short operators: only shares are taken from it, to be applied to the time measured without.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from s2q.nn import attention, packed, simulated

CATEGORIES = ("gemm", "activation_path", "attention", "norms", "other")

_PREFIX = "s2q.bench."
_ATTENTION = ("attention", "flash", "sdpa")
_PREPARING = ((packed, "activation_path"), (packed, "transform_input"), (simulated, "transform_input"))
"""Functions that a packed linear calls to prepare its input, by module."""


def breakdown(call: Callable[[], object], model: nn.Module, *, device: str) -> dict[str, float]:
    """Return what share of a call's time each of `CATEGORIES` takes; they add up to 1."""
    on_gpu = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with _ranges(model):
        call()  # what is done only once, such as compiling, is no part of it
        with profile(activities=activities) as recorded:
            call()
            if on_gpu:
                torch.cuda.synchronize(device)
    sums = dict.fromkeys(CATEGORIES, 0.0)
    kernels = 0.0
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CPU:
            sums[_category(event)] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
        elif not (event.is_user_annotation or event.name.startswith(_PREFIX)):
            kernels += event.self_device_time_total
    sums["other"] += max(0.0, kernels - sum(sums.values()))  # kernels that the profiler could not assign
    total = sum(sums.values())
    return {name: value / total if total else 0.0 for name, value in sums.items()}


def _category(event: Any) -> str:
    """The category of the innermost range around an operator, or of the attention that it is part of."""
    while event is not None:
        if event.name.startswith(_PREFIX):
            return str(event.name.removeprefix(_PREFIX))
        if any(word in event.name for word in _ATTENTION):
            return "attention"
        event = event.cpu_parent
    return "other"


@contextlib.contextmanager
def _ranges(model: nn.Module) -> Iterator[None]:
    """Put named ranges around linears, norms, and the functions that prepare the input of a packed linear."""
    parts = [(module, "forward", _category_of(module)) for module in model.modules()]
    parts += [(module, name, "activation_path") for module, name in _PREPARING]
    parts.append((attention, "int8_attention", "attention"))
    with contextlib.ExitStack() as stack:
        for owner, name, category in parts:
            if category is not None:
                in_range = record_function(_PREFIX + category)(getattr(owner, name))
                stack.enter_context(patch.object(owner, name, in_range))
        yield


def _category_of(module: nn.Module) -> str | None:
    if isinstance(module, nn.Linear):
        return "gemm"
    return "norms" if "Norm" in type(module).__name__ else None
