"""Layers of a transformer know where the video tokens of the call at hand are.

A hook before the transformer's forward sets the grid of the call, one after it restores that of the call around it. A
block that is computed again in the backward pass gets the grid of the call that it belongs to.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from s2q.common.errors import UsageError
from s2q.core.tokens import TokenLayout, begin_call, carried_call, end_call

_CHECKPOINT = "_gradient_checkpointing_func"
"""Attribute of diffusers' modules: the function that they call a block through while gradients are checkpointed."""


def follow_tokens(transformer: nn.Module, layout: TokenLayout) -> None:
    """Let the packed layers of a transformer know the grid of every call, in place; a second time changes nothing."""
    unfollow_tokens(transformer)
    transformer.register_forward_pre_hook(_Begin(transformer, layout), with_kwargs=True)
    transformer.register_forward_hook(_end, always_call=True)


def unfollow_tokens(transformer: nn.Module) -> None:
    """Undo `follow_tokens`, in place, if it was called."""
    hooks = (
        transformer._forward_pre_hooks,
        transformer._forward_pre_hooks_with_kwargs,
        transformer._forward_hooks,
        transformer._forward_hooks_always_called,
    )
    for key in [key for by_key in hooks for key, hook in by_key.items() if hook is _end or isinstance(hook, _Begin)]:
        for by_key in hooks:
            by_key.pop(key, None)
    for module in transformer.modules():
        function = module.__dict__.get(_CHECKPOINT)
        if isinstance(function, _Checkpoint):
            setattr(module, _CHECKPOINT, function.checkpoint)


class _Begin:
    """The hook before a call."""

    def __init__(self, transformer: nn.Module, layout: TokenLayout) -> None:
        _self, *parameters = inspect.signature(type(transformer).forward).parameters
        self.parameters, self.layout = tuple(parameters), layout

    def __call__(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        begin_call(None)  # the hook after the call ends it, also where the next lines fail
        _check_whole(transformer)
        named = dict(zip(self.parameters, args, strict=False))
        grid = self.layout.grid({**named, **kwargs})
        end_call()
        begin_call(grid)
        if getattr(transformer, "gradient_checkpointing", False):
            _carry_grids(transformer)


def _check_whole(transformer: nn.Module) -> None:
    """Refuse context parallelism: each process has a part of the tokens, and cubes may lie in two."""
    parallel = getattr(getattr(transformer, "_parallel_config", None), "context_parallel_config", None)
    if parallel is not None:
        raise UsageError(
            f"{type(transformer).__name__}: its linears depend on the positions of video tokens (activations.delta or "
            "transforms.estimator of its recipe), which context parallelism divides among processes; call it without "
            "enable_parallelism(), or quantize without these options, with activations.delta=null"
        )


def _end(_transformer: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
    end_call()


def _carry_grids(transformer: nn.Module) -> None:
    """Have blocks that are called through a checkpointing function, diffusers' or the user's, keep their grid."""
    if isinstance(getattr(transformer, _CHECKPOINT, None), _Checkpoint):
        return
    for module in transformer.modules():
        function = getattr(module, _CHECKPOINT, None)
        if function is not None:
            setattr(module, _CHECKPOINT, _Checkpoint(function))


class _Checkpoint:
    """A checkpointing function whose blocks are called with the grid of the first call each time."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = carried_call()

        def in_call(*args: Any, **kwargs: Any) -> Any:
            with call():
                return block(*args, **kwargs)

        return self.checkpoint(in_call, *args, **kwargs)
