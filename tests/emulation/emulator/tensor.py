"""Tensors that say they are on a GPU, and the mode that makes them."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import overrides
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from emulation.emulator.stats import STATS

CPU = torch.device("cpu")
aten = torch.ops.aten

current_device: Callable[[], int] = lambda: 0  # noqa: E731  (`install` puts the guard's in its place)

_COPIES = {aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default}
_INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
"""These take CPU tensors as indices."""
_TAKE_CPU_SCALARS = {
    aten.where.self,
    aten.index_fill_.int_Tensor,
    aten.masked_fill.Tensor,
    aten.masked_fill_.Tensor,
    aten.fill_.Tensor,
    aten.lerp.Tensor,
}
"""Besides those that are tagged as pointwise."""
_SYNCHRONISING = {
    aten._local_scalar_dense.default,
    aten._unique2.default,
    aten.bincount.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
}
_MADE = {torch.tensor, torch.as_tensor, torch.asarray}
_NO_KERNELS = {aten.detach.default, aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default}


class _Operator(NamedTuple):
    """What the emulator needs to know of an operator; looked up once, since operators are slow to ask."""

    name: str
    is_kernel: bool
    synchronises: bool
    copies: bool
    takes_cpu_indices: bool
    takes_cpu_scalars: bool
    changes_shape: bool


@functools.cache
def _operator(func: Any) -> _Operator:
    return _Operator(
        name=str(func),
        is_kernel=not func.is_view and func not in _NO_KERNELS,
        synchronises=func in _SYNCHRONISING,
        copies=func in _COPIES,
        takes_cpu_indices=func in _INDEXING,
        takes_cpu_scalars=torch.Tag.pointwise in func.tags or func in _TAKE_CPU_SCALARS,
        changes_shape=torch.Tag.inplace_view in func.tags and func is not aten.detach_.default,
    )


class _Held:
    """Keeps a storage counted for as long as a tensor lives (tensors come back to life, their attributes do not)."""

    def __init__(self, inner: torch.Tensor, device: int) -> None:
        self.key = STATS.hold(inner, device)

    def __del__(self) -> None:
        STATS.release(self.key)


class EmulatedTensor(torch.Tensor):
    """A tensor whose device is cuda:0 or cuda:1 and whose values are in a CPU tensor inside.

    Args:
        inner: The CPU tensor.
        requires_grad: Used where a class of tensors is called as `torch.nn.Parameter` is.
        index: Of the GPU.
    """

    inner: torch.Tensor
    index: int

    @staticmethod
    def __new__(cls, inner: torch.Tensor, requires_grad: bool = False, *, index: int = 0) -> EmulatedTensor:
        if isinstance(inner, EmulatedTensor):  # `type(parameter)(value, requires_grad=...)`, as accelerate does
            return torch.nn.Parameter(inner, requires_grad)
        out = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("cuda", index),
            requires_grad=False,
        )
        out.inner, out.index, out.held = inner, index, _Held(inner, index)
        return out

    def __repr__(self, **_: Any) -> str:
        return f"emulated({self.inner!r}, device='cuda:{self.index}')"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            assert self.is_leaf, "only leaves are copied"
            new = self.detach().clone(memory_format=torch.preserve_format)
            if isinstance(self, torch.nn.Parameter):
                memo[id(self)] = torch.nn.Parameter(new, self.requires_grad)
            else:
                memo[id(self)] = new.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def numpy(self, **_: Any) -> Any:
        raise TypeError(
            f"can't convert cuda:{self.index} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
            "memory first."
        )

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def record_stream(self, _stream: Any) -> None: ...

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __tensor_flatten__(self) -> tuple[list[str], int]:
        return ["inner"], self.index

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Any], meta: int, _size: Any, _stride: Any) -> EmulatedTensor:
        return EmulatedTensor(inner["inner"], index=meta)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return emulate(func, args, kwargs or {})


def is_emulated(value: Any) -> bool:
    """Tell whether a value is a tensor on an emulated GPU."""
    return isinstance(value, EmulatedTensor)


def is_pinned(tensor: torch.Tensor) -> bool:
    """Tell whether a CPU tensor, or the one it is a view of, is in what was allocated as page-locked memory."""
    return any(getattr(one, "emulated_pinned", False) for one in (tensor, tensor._base))


def cuda_index(device: Any) -> int | None:
    """Return the index of the GPU that a device names ("cuda" is the current one); None for other devices."""
    if device is None:
        return None
    named = torch.device(device)
    if named.type != "cuda":
        return None
    return current_device() if named.index is None else named.index


def emulate(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on what is inside its arguments.

    Raises:
        RuntimeError: If it gets tensors of several devices that CUDA would not take together.
    """
    tensors: list[torch.Tensor] = []
    _gather(args, tensors)
    if kwargs:
        _gather(kwargs.values(), tensors)
    emulated = [one for one in tensors if isinstance(one, EmulatedTensor)]
    device = kwargs.get("device")
    target = cuda_index(device)
    if not emulated and target is None:
        result = func(*args, **kwargs)
        if kwargs.get("pin_memory"):
            result.emulated_pinned = True
        return result
    operator = _operator(func)
    if operator.changes_shape:
        raise NotImplementedError(f"{func}: changes what a wrapper is, not emulated")
    if len(tensors) > 1:
        _check_devices(operator, tensors, emulated)
    is_copy = func is aten.copy_.default
    to_host = not isinstance(args[0], EmulatedTensor) if is_copy else device is not None and target is None
    _count(operator, args, kwargs, emulated, to_host=to_host)
    inner_args = [_inner(one) for one in args]
    inner_kwargs = {name: _inner(one) for name, one in kwargs.items()}
    if target is not None:
        inner_kwargs["device"] = CPU
        inner_kwargs.pop("pin_memory", None)
    result = func(*inner_args, **inner_kwargs)
    if func is aten._to_copy.default and _moves(args[0], target):  # devices never share memory
        result = result.clone() if result.data_ptr() == inner_args[0].data_ptr() and result.numel() else result
    if to_host:
        return args[0] if is_copy else result
    return _wrap(result, emulated, target if target is not None else emulated[0].index)


def _gather(value: Any, into: list[torch.Tensor]) -> None:
    for one in value:
        if isinstance(one, torch.Tensor):
            into.append(one)
        elif isinstance(one, list | tuple):
            _gather(one, into)


def _inner(value: Any) -> Any:
    if isinstance(value, EmulatedTensor):
        return value.inner
    if isinstance(value, list | tuple):
        return type(value)([_inner(one) for one in value])
    return value


def _wrap(value: Any, emulated: list[EmulatedTensor], index: int) -> Any:
    if isinstance(value, torch.Tensor):
        for one in emulated:  # of an operator in place
            if one.inner is value:
                return one
        return EmulatedTensor(value.detach() if value.requires_grad else value, index=index)
    if isinstance(value, list | tuple):
        return type(value)([_wrap(one, emulated, index) for one in value])
    return value


def _moves(tensor: torch.Tensor, target: int | None) -> bool:
    return target is not None and getattr(tensor, "index", None) != target


def _check_devices(operator: _Operator, tensors: list[torch.Tensor], emulated: list[EmulatedTensor]) -> None:
    if operator.copies or not emulated:
        return
    first = emulated[0].index
    for one in tensors:
        if isinstance(one, EmulatedTensor):
            if one.index == first:
                continue
        elif one.is_meta:
            raise RuntimeError(f"{operator.name}: a meta tensor beside tensors on cuda:{first}")
        elif operator.takes_cpu_indices or (operator.takes_cpu_scalars and one.dim() == 0):
            continue
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:{first} and "
            f"{one.device}! (emulated; {operator.name} got {one.dtype} {list(one.shape)} on {one.device})"
        )


def _count(
    operator: _Operator, args: tuple[Any, ...], kwargs: dict[str, Any], emulated: list[EmulatedTensor], *, to_host: bool
) -> None:
    STATS.count(operator.name, is_kernel=operator.is_kernel)
    by_mask = operator.takes_cpu_indices and any(one.dtype in (torch.bool, torch.uint8) for one in emulated[1:])
    waits_for_copy = to_host and bool(emulated) and not (kwargs.get("non_blocking") or args[2:3] == (True,))
    if operator.synchronises or by_mask or waits_for_copy:
        STATS.count_synchronisation(operator.name)
    if operator.copies and not to_host:
        source = args[1] if operator.name == "aten.copy_.default" else args[0]
        if isinstance(source, torch.Tensor) and not isinstance(source, EmulatedTensor):
            kind = "pinned" if is_pinned(source) else "pageable"
            STATS.count_upload(kind if source.dim() else "scalar")


class _Mode(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the wrapper that it saves is a fifth of the time

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return emulate(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What never reaches the dispatcher, or cannot be told there: generators, pinned memory, `.data = ...`."""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _MADE:
            index = cuda_index(kwargs.get("device")) if kwargs else None
            if index is not None:
                made = func(*args, **{**kwargs, "device": "cpu"})
                return made.to(torch.device("cuda", index)).requires_grad_(made.requires_grad)
        elif func is torch.Tensor.pin_memory:
            pinned = args[0].clone()
            pinned.emulated_pinned = True
            return pinned
        elif func is torch.Tensor.is_pinned:
            return is_pinned(args[0])
        elif func is torch.Tensor.tolist and is_emulated(args[0]):
            return args[0].cpu().tolist()
        elif func is torch.Tensor.new_tensor and is_emulated(args[0]) and "device" not in (kwargs or {}):
            return torch.tensor(args[1], **{"dtype": args[0].dtype, **(kwargs or {})}).to(args[0].device)
        elif func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and is_emulated(args[0]):
            args = (args[0], _index_on(args[0].device, args[1]), *args[2:])
        elif getattr(func, "__name__", "") == "__set__" and func == torch.Tensor.data.__set__:
            return _set_data(*args)
        if kwargs is None:
            return func(*args)
        if (generator := kwargs.get("generator")) is not None:
            _check_generator(func, args, kwargs, generator)
        return func(*args, **kwargs)


def _index_on(device: torch.device, index: Any) -> Any:
    """Return an index whose lists are tensors on the device, as PyTorch makes them below the dispatcher."""
    if isinstance(index, list):
        return torch.tensor(index).to(device)
    return tuple(_index_on(device, part) for part in index) if isinstance(index, tuple) else index


def _check_generator(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], generator: torch.Generator) -> None:
    of_tensor = args[0].device if args and isinstance(args[0], torch.Tensor) else None
    where = torch.device(kwargs.get("device") or of_tensor or "cpu")
    if where.type != generator.device.type:
        raise RuntimeError(
            f"Expected a '{where.type}' device type for generator but found '{generator.device}' (emulated; {func})"
        )


def _set_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """`tensor.data = value`, whatever device either is on; the identity of the tensor stays."""
    if not is_emulated(tensor) and not is_emulated(value):
        with torch._C.DisableTorchFunction():
            tensor.data = value
        return
    new = value.detach()
    if isinstance(tensor, torch.nn.Parameter):
        new = torch.nn.Parameter(new, tensor.requires_grad)
    torch.utils.swap_tensors(tensor, new)


@contextlib.contextmanager
def no_emulation() -> Iterator[None]:
    """Plain PyTorch for a while."""
    with _python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction():
        yield


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """Plain PyTorch in this thread, in which contexts such as `torch.device("meta")` still work."""
    with _python_dispatch._disable_current_modes(), overrides._pop_mode_temporarily() as mode:
        assert isinstance(mode, _Functions)
        yield


def start() -> None:
    """Emulate from here on, in this thread and in every one that is started later."""
    run = threading.Thread.run

    def emulated_run(self: threading.Thread) -> None:
        with _Functions(), _Mode():
            run(self)

    threading.Thread.run = emulated_run  # type: ignore[method-assign]
    _Functions().__enter__()
    _Mode().__enter__()
