"""What the layers of a transformer know of the call at hand: where the video tokens lie.

The layers of one transformer share a `TokenContext`; a hook before the transformer's forward writes the grid of the
call into it. Outside of a transformer, while a block is calibrated for example, `set_token_grid` does.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from s2q.core.tokens import TokenGrid, TokenLayout


class TokenContext:
    """Where the video tokens of the call at hand lie.

    Attributes:
        grid: The grid; None if nobody has said.
    """

    def __init__(self) -> None:
        self.grid: TokenGrid | None = None


def set_token_grid(module: nn.Module, grid: TokenGrid | None) -> None:
    """Tell the layers of a module where the video tokens of the next call lie.

    Args:
        module: A block, for example; may have no layer that wants to know.
        grid: The grid; None if it is not known.
    """
    for context in _contexts(module):
        context.grid = grid


def follow_tokens(transformer: nn.Module, layout: TokenLayout) -> None:
    """Let the layers of a transformer know the grid of every call, in place; a second time changes nothing.

    Copies of the transformer follow their own calls.

    Args:
        transformer: A transformer, its layers packed.
        layout: How it makes tokens of its arguments.
    """
    unfollow_tokens(transformer)
    context = TokenContext()
    for module in transformer.modules():
        if _context(module) is not None:
            module.__dict__["tokens"] = context
    transformer.register_forward_pre_hook(_Follow(transformer, layout, context), with_kwargs=True)


def unfollow_tokens(transformer: nn.Module) -> None:
    """Undo `follow_tokens`, in place.

    Args:
        transformer: A transformer; need not follow.
    """
    for key, hook in list(transformer._forward_pre_hooks.items()):
        if isinstance(hook, _Follow):
            del transformer._forward_pre_hooks[key]
            transformer._forward_pre_hooks_with_kwargs.pop(key, None)


class _Follow:
    """The hook; an object and not a closure, so that a copy of the transformer has the copied context."""

    def __init__(self, transformer: nn.Module, layout: TokenLayout, context: TokenContext) -> None:
        _self, *parameters = inspect.signature(type(transformer).forward).parameters
        self.parameters, self.layout, self.context = tuple(parameters), layout, context

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(zip(self.parameters, args, strict=False))
        self.context.grid = self.layout.grid({**named, **kwargs})


def _contexts(module: nn.Module) -> Iterator[TokenContext]:
    return (context for one in module.modules() if (context := _context(one)) is not None)


def _context(layer: nn.Module) -> TokenContext | None:
    context = layer.__dict__.get("tokens")
    return context if isinstance(context, TokenContext) else None
