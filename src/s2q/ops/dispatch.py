"""Selection of the backend of an op: "reference" anywhere, "cpu" there, "triton" on NVIDIA GPUs from capability 8.0.

Nothing here imports triton; a backend's module does, and is imported at the first call that runs it. With
TRITON_INTERPRET=1, set before triton is imported, Triton runs kernels on the CPU (slow, for tests): the backend
"triton" then takes CPU tensors too, but "auto" does not choose it.

Where a kernel cannot run (the GPU is not in the tables of tiles, a shape has no tile, Triton cannot be imported, or
compiling or launching fails), it raises `KernelUnavailableError`. With "auto" the op then runs in PyTorch on the same
device and logs one line with the reason; a launch that failed is not tried again in the process.
"""

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, library

from s2q.common.errors import InvalidInputError, S2QError, unknown_name
from s2q.common.log import log_once
from s2q.common.torch_state import without_autocast
from s2q.ops.architectures import nearest_architecture

_P = ParamSpec("_P")
_T = TypeVar("_T")

logger = logging.getLogger(__name__)

MIN_CAPABILITY = (8, 0)
"""Of the GPU: the first with int8 and bf16 tensor cores that Triton serves."""

FP4, FP4_CAPABILITY = "fp4", (10, 0)
"""The backend of NVFP4 products (`nn.fp4`), and the GPUs that have them."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
"""That the kernels read as their main input. fp64 is left to the references."""

_REMEDY = "use backend='reference'"

_NO_REFUSALS = (S2QError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
"""Errors of a launch that PyTorch would meet too, or that are not about the kernel."""

_CONTEXT_LOST = ("illegal memory access", "misaligned address", "illegal instruction", "launch failure", "device-side")
"""Parts of CUDA's messages after which nothing can run on the device in this process."""

_REFUSED: dict[tuple[object, ...], str] = {}
"""Reasons why modules could not be imported and launches failed, so that none is tried twice."""


class KernelUnavailableError(InvalidInputError):
    """A Triton kernel cannot run for these tensors on this device, for a reason in a few words."""

    def __init__(self, reason: str, *, op: str | None = None) -> None:
        super().__init__(reason if op is None else f"{op}: backend 'triton' cannot run: {reason}; {_REMEDY}")
        self.reason = reason
        self.op = op


@functools.cache
def has_triton() -> bool:
    """Whether the package is installed; looked up once, not imported."""
    return importlib.util.find_spec("triton") is not None


def is_interpreting() -> bool:
    """Whether Triton was asked to run kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def opaque_op(name: str, shape: Callable[..., _T]) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Make an op of a function: it bypasses autocast, and torch.compile does not look inside.

    `shape` takes the same arguments and returns uninitialised results.
    """

    def decorate(run: Callable[_P, _T]) -> Callable[_P, _T]:
        traced = library.custom_op(f"s2q::{name}", run, mutates_args=())
        traced.register_fake(shape)

        @functools.wraps(run)
        def choose(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            return (traced if torch.compiler.is_compiling() else run)(*args, **kwargs)

        return without_autocast(choose)

    return decorate


def triton_obstacle(x: Tensor) -> str | None:
    """Say in a few words why the Triton backend cannot take an op's main input; None if it can."""
    if not has_triton():
        return "triton is not installed"
    if x.dtype not in DTYPES:
        return f"got {x.dtype}; expected one of {', '.join(map(str, DTYPES))}"
    if is_interpreting():
        return None
    if x.device.type != "cuda" or torch.version.hip is not None:
        return f"got a tensor on {'a ROCm device' if x.is_cuda else x.device}; expected an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(x.device)
    number = ".".join(map(str, capability))
    if capability < MIN_CAPABILITY:
        return f"got a GPU of compute capability {number}; expected 8.0 or newer"
    if nearest_architecture(capability) is None:
        return f"got a GPU of compute capability {number}, for which no tiles are known"
    return None


def backend_obstacle(backend: str, x: Tensor) -> str | None:
    """Say in a few words why a backend cannot take an op's main input (an empty one will do); None if it can."""
    if backend == "cpu" and x.device.type != "cpu":
        return f"got a tensor on {x.device}; expected one on the CPU"
    if backend == FP4:
        return fp4_obstacle(x.device)
    return triton_obstacle(x) if backend == "triton" else None


def fp4_obstacle(device: torch.device) -> str | None:
    """Say in a few words why a device has no products of NVFP4 blocks; None if it has."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"got a tensor on {device}; expected an NVIDIA GPU of compute capability 10.0 or newer"
    capability = torch.cuda.get_device_capability(device)
    if capability < FP4_CAPABILITY:
        return f"got a GPU of compute capability {'.'.join(map(str, capability))}; expected 10.0 or newer"
    return None


def triton_backend(name: str) -> Callable[..., Any]:
    """Make the backend "triton" of an op: checks whether it can run, then imports and calls it.

    It is the function "s2q.ops.<name>.triton.<name>", whose first argument is the op's main input; the device of that
    is current during the call, since Triton launches there. The result raises `KernelUnavailableError`.
    """

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        obstacle = triton_obstacle(x)
        if obstacle is not None:
            raise KernelUnavailableError(obstacle, op=name)
        try:
            implementation = getattr(_import_kernels(f"s2q.ops.{name}.triton"), name)
            with torch.cuda.device(x.device if x.is_cuda else -1):
                return implementation(x, *args, **kwargs)
        except KernelUnavailableError as error:
            raise KernelUnavailableError(error.reason, op=name) from error

    return run


def _import_kernels(module: str) -> ModuleType:
    """Import a module of kernels, and with it triton, which may be installed and broken."""
    if (module,) not in _REFUSED:
        try:
            return importlib.import_module(module)
        except Exception as error:  # a broken installation may raise anything
            _REFUSED[module,] = f"triton cannot be imported: {_first_line(error)}"
    raise KernelUnavailableError(_REFUSED[module,])


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
    """Launch a Triton kernel on the current device, with its arguments and compile-time constants.

    Raises:
        KernelUnavailableError: If it does not compile, asks for more than the GPU has, or Triton lacks a tool or the
            driver; again without a try if the same launch (kernel, device, dtypes and settings) failed before.
    """
    if _REFUSED and (key := _launch_key(kernel, arguments, settings)) in _REFUSED:
        raise KernelUnavailableError(_REFUSED[key])
    try:
        kernel[grid](*arguments, **settings)
    except _NO_REFUSALS:
        raise
    except Exception as error:  # the compiler's own, of the tools it runs, of the driver: Triton has no common base
        text = str(error)
        if any(part in text for part in _CONTEXT_LOST):
            raise
        reason = f"{kernel.__name__}: {_first_line(error)}"
        if "out of memory" not in text:
            _REFUSED[_launch_key(kernel, arguments, settings)] = reason
        raise KernelUnavailableError(reason) from error


def _launch_key(kernel: Any, arguments: tuple[Any, ...], settings: Mapping[str, Any]) -> tuple[object, ...]:
    dtypes = tuple(value.dtype if isinstance(value, Tensor) else type(value) for value in arguments)
    return kernel.__name__, arguments[0].device, dtypes, *settings.items()


def _first_line(error: Exception) -> str:
    """Return the type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def resolve_backend(backend: str, x: Tensor, backends: Collection[str]) -> str:
    """Return the name of the backend that runs an op for its main input; an empty tensor will do.

    "auto" is "triton" on a GPU that it can serve, "cpu" on the CPU where the op has it, and "reference" otherwise.

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
    log_once(logger, level, f"on {x.device}, backend 'auto' of quantized linears is {chosen!r}{reason}")
    return chosen


def choose_backend(backend: str, x: Tensor, backends: Mapping[str, Callable[..., _T]]) -> Callable[..., _T]:
    """Pick the function that runs an op (`resolve_backend`). With "auto", the reference runs where a kernel cannot."""
    resolved = resolve_backend(backend, x, backends)
    if backend == "auto" and resolved == "triton":
        return _with_fallback(backends["triton"], backends["reference"])
    return backends[resolved]


def _with_fallback(kernel: Callable[..., _T], reference: Callable[..., _T]) -> Callable[..., _T]:
    def run(x: Tensor, *args: Any, **kwargs: Any) -> _T:
        try:
            return kernel(x, *args, **kwargs)
        except KernelUnavailableError as error:
            reason = f"{error.op} on {_card(x.device)} runs in PyTorch, slower than its kernel: {error.reason}"
        log_once(logger, logging.WARNING, reason)
        return reference(x, *args, **kwargs)

    return run


def _card(device: torch.device) -> str:
    """Return a device with the name of its GPU."""
    with contextlib.suppress(RuntimeError, AssertionError):  # a name must not be what a call fails for
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


def architecture_of(x: Tensor) -> int:
    """Return the architecture whose tiles a tensor's GPU takes; the interpreter takes those of the first.

    Raises:
        KernelUnavailableError: If there are no tiles for the GPU.
    """
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else MIN_CAPABILITY
    architecture = nearest_architecture(capability)
    if architecture is None:
        raise KernelUnavailableError(f"no tiles are known for compute capability {capability[0]}.{capability[1]}")
    return architecture
