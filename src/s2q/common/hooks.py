"""Recording of module calls through hooks that are removed afterwards."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


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


class _NotFiniteError(Exception):
    """A module returned NaN or infinite values; its name."""


def first_not_finite(modules: Mapping[str, nn.Module], run: Callable[[], object]) -> str | None:
    """Run until a module within the named ones returns NaN or infinite values; return its full name, or None."""

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            tensor = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
            if tensor is not None and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise _NotFiniteError(name)

        return hook

    with ExitStack() as stack:
        for prefix, module in modules.items():
            for name, inner in module.named_modules():
                full = ".".join(part for part in (prefix, name) if part)
                stack.callback(inner.register_forward_hook(look(full)).remove)
        try:
            run()
        except _NotFiniteError as error:
            return str(error)
    return None


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
