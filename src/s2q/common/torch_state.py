"""Results of s2q do not depend on torch state that a caller has set.

That state is the default dtype, the default device, the gradient and inference modes, and autocast. Verbs (quantize,
generate, evaluate, compare, plan, bench, load, inspect) run models of other libraries: they run in the state of a fresh
process, see `in_fresh_torch_state`. Operations and packed linears run within a caller's model: they name every dtype
and device and bypass autocast, see `without_autocast`.

The default dtype belongs to the process, everything else to the thread. While a verb runs, other threads see float32.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Generic, ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")


@contextmanager
def fresh_torch_state() -> Iterator[None]:
    """Run what is within in the state that a fresh process has, and restore the caller's afterwards.

    Default dtype float32, default device "cpu", gradients on, no inference mode, no autocast.
    """
    with ExitStack() as stack:
        stack.enter_context(_DEFAULT_DTYPE)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            stack.enter_context(_without(device))
        yield


in_fresh_torch_state = fresh_torch_state()
"""Decorator of functions that are no generators: each call runs in `fresh_torch_state`."""


def without_autocast(operation: Callable[_P, _T]) -> Callable[_P, _T]:
    """Make a function compute in the dtypes that it names, within `torch.autocast` too; torch.compile may trace it."""

    @functools.wraps(operation)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if torch._C._is_any_autocast_enabled():  # takes a third of the time of asking for a device
            with _without("cpu"), _without("cuda"):
                return operation(*args, **kwargs)
        return operation(*args, **kwargs)

    return run


def _without(device: str) -> AbstractContextManager[object]:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


@contextmanager
def tf32_products(device: str | torch.device) -> Iterator[None]:
    """Have a GPU multiply fp32 matrices in TF32, with ten bits of mantissa, until the context ends."""
    with _TF32 if torch.device(device).type == "cuda" else nullcontext():
        yield


class _ProcessWide(Generic[_T]):
    """A value of the process for any number of contexts: the first one saves what was there, the last restores it."""

    def __init__(self, value: _T, *, read: Callable[[], _T], write: Callable[[_T], object]) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._value = self._saved = value
        self._read, self._write = read, write

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._saved = self._read()
                self._write(self._value)
            self._users += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._write(self._saved)


_DEFAULT_DTYPE = _ProcessWide(torch.float32, read=torch.get_default_dtype, write=torch.set_default_dtype)


def _set_matmul_precision(value: str) -> None:
    """Set both switches of fp32 products on GPUs: PyTorch refuses to read the older one where they differ."""
    torch.backends.cuda.matmul.allow_tf32 = value == "tf32"
    torch.backends.cuda.matmul.fp32_precision = value


_TF32 = _ProcessWide("tf32", read=lambda: torch.backends.cuda.matmul.fp32_precision, write=_set_matmul_precision)
