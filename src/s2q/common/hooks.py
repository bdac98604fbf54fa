"""Recording of module calls through hooks that are removed afterwards."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


class _ReachedError(Exception):
    """The first call was made."""


@contextmanager
def capture_calls(
    module: nn.Module, *, only_first: bool = False
) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Yield a list that gets the positional and the keyword arguments of every call of a module.

    With `only_first`, the context is left at the first call, before the module runs.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))
        if only_first:
            raise _ReachedError

    handle = module.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield calls
    except _ReachedError:
        pass
    finally:
        handle.remove()


@contextmanager
def capture_inputs(block: nn.Module, listeners: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Tell listeners the inputs of the modules of a block whose names they are under."""
    with ExitStack() as stack:
        for name, listener in listeners.items():
            handle = block.get_submodule(name).register_forward_pre_hook(
                lambda _module, args, listener=listener: listener(args[0])
            )
            stack.callback(handle.remove)
        yield
