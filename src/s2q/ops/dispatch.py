"""Which backend of an op runs: "reference" anywhere, "cpu" there, "triton" on NVIDIA GPUs from capability 8.0.

Nothing here imports triton; a backend's module does, and is imported at the first call that runs it. With
TRITON_INTERPRET=1, set before triton is imported, Triton runs kernels on the CPU (slow, for tests): the backend
"triton" then takes CPU tensors too, but "auto" does not choose it.
"""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from s2q.core.errors import InvalidInputError, unknown_name

logger = logging.getLogger(__name__)

MIN_CAPABILITY = (8, 0)
"""Of the GPU: the first with int8 and bf16 tensor cores that Triton serves."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
"""That the kernels read as their main input. fp64 is left to the references."""

_REMEDY = "use backend='reference'"


@functools.cache
def has_triton() -> bool:
    """Whether the package is installed; looked up once, not imported."""
    return importlib.util.find_spec("triton") is not None


def is_interpreting() -> bool:
    """Whether Triton was asked to run kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_obstacle(x: Tensor) -> str | None:
    """Say in a few words why the Triton backend cannot take a tensor; None if it can.

    Args:
        x: Main input of an op.
    """
    if not has_triton():
        return "triton is not installed"
    if x.dtype not in DTYPES:
        return f"got {x.dtype}; expected one of {', '.join(map(str, DTYPES))}"
    if is_interpreting():
        return None
    if x.device.type != "cuda" or torch.version.hip is not None:
        return f"got a tensor on {'a ROCm device' if x.is_cuda else x.device}; expected an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(x.device)
    if capability < MIN_CAPABILITY:
        return f"got a GPU of compute capability {'.'.join(map(str, capability))}; expected 8.0 or newer"
    return None


def backend_obstacle(backend: str, x: Tensor) -> str | None:
    """Say in a few words why a backend cannot take a tensor; None if it can.

    Args:
        backend: "auto", "reference", "cpu" or "triton".
        x: Main input of an op; an empty one on the device will do.
    """
    if backend == "cpu" and x.device.type != "cpu":
        return f"got a tensor on {x.device}; expected one on the CPU"
    return triton_obstacle(x) if backend == "triton" else None


def triton_backend(package: str, name: str) -> Callable[..., Any]:
    """Make the backend "triton" of an op: checks whether it can run, then imports and calls it.

    Args:
        package: Of the op, "s2q.ops.<op>".
        name: Of the function in the package's module `triton`; its first argument is the op's main input.

    Returns:
        A function of the same signature. It raises `InvalidInputError` if triton is not installed or cannot serve the
        device or dtype. Triton launches on the current device, so that of the tensor is made current for the call.
    """

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        obstacle = triton_obstacle(x)
        if obstacle is not None:
            raise InvalidInputError(f"{name}: backend 'triton' cannot run: {obstacle}; {_REMEDY}")
        implementation = getattr(importlib.import_module(f"{package}.triton"), name)
        with torch.cuda.device(x.device if x.is_cuda else -1):
            return implementation(x, *args, **kwargs)

    return run


def resolve_backend(backend: str, x: Tensor, backends: Collection[str]) -> str:
    """Return the name of the backend that runs an op.

    Args:
        backend: "auto", or a name in `backends`. "auto" is "triton" if x is on a GPU that it can serve,
            "cpu" on the CPU where the op has it, and "reference" otherwise.
        x: Main input of the op; an empty one on the device will do.
        backends: Names of those that the op has.

    Raises:
        InvalidInputError: If there is no such backend, or it cannot take x.
    """
    if backend == "auto":
        return _automatic(x, backends)
    if backend not in backends:
        raise unknown_name("backend", backend, ("auto", *backends))
    if backend == "cpu" and (obstacle := backend_obstacle(backend, x)) is not None:
        raise InvalidInputError(f"backend 'cpu' cannot run: {obstacle}; {_REMEDY}")
    return backend


def _automatic(x: Tensor, backends: Collection[str]) -> str:
    chosen, level, reason = "reference", logging.DEBUG, ""
    if x.device.type == "cpu" and "cpu" in backends:
        chosen = "cpu"
    elif x.is_cuda:
        obstacle = triton_obstacle(x)
        if obstacle is None:
            chosen = "triton"
        else:
            level, reason = logging.WARNING, f", slower than full precision: {obstacle}"
    _say_once(level, f"on {x.device}, backend 'auto' of quantized linears is {chosen!r}{reason}")
    return chosen


@functools.cache
def _say_once(level: int, message: str) -> None:
    logger.log(level, message)


def choose_backend(backend: str, x: Tensor, backends: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """Pick the function that runs an op.

    Args:
        backend: See `resolve_backend`.
        x: Main input of the op.
        backends: The op's functions by name.

    Raises:
        InvalidInputError: If there is no such backend, or it cannot take x.
    """
    return backends[resolve_backend(backend, x, backends)]


def capability_of(x: Tensor) -> tuple[int, int]:
    """Return the compute capability of a tensor's GPU; that of the interpreter is the lowest supported one.

    Args:
        x: On a GPU, or anywhere when interpreting.
    """
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else MIN_CAPABILITY
