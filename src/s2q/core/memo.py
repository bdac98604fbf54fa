"""Computing once what several readers need while parameters do not change, and again what need not be kept.

The linears that read one input share its transform, and each of them asks for the same rotated input and the same
inverse. Within `memoization` such results are kept; outside, nothing is. Where memory is short, `checkpointed` keeps
the inputs of a function alone until the backward pass, which then calls it again (gradient checkpointing).
"""

import functools
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from s2q.core.tokens import TokenGrid, carried_call, current_grid, cut_tokens, token_grid

_T = TypeVar("_T")
_Results = dict[tuple[int, Hashable], tuple[object, Any]]

PIECE = 8192
"""Tokens at a time, of what treats each token by itself: computed again in a backward pass, or added to a Hessian."""


@dataclass(frozen=True)
class _Kept:
    """Results of parameters alone, by owner and key; and of a subject, the latest one by owner.

    Within a function that is called again in the backward pass, subjects are those of that call.
    """

    results: _Results = field(default_factory=dict)
    latest: dict[int, tuple[object, object, Any]] = field(default_factory=dict)
    called_again: bool = False


_held: ContextVar[_Kept | None] = ContextVar("held", default=None)


@contextmanager
def memoization() -> Iterator[None]:
    """Keep the results of `memoize_step` until the context ends; no parameter may change within it.

    A training step is a good context: its forward and backward pass. Results are kept with their graphs, so that a
    shared one gets the gradients of all of its readers.
    """
    with _holding(_Kept()):
        yield


def memoize_step(owner: object, key: Hashable, compute: Callable[[], _T]) -> _T:
    """Return what `compute` makes of the owner's parameters and the key, or what it made before in this context."""
    kept = _held.get()
    if kept is None:
        return compute()
    place = (id(owner), key)
    if place not in kept.results:
        with saved_as_usual() if kept.called_again else nullcontext():
            kept.results[place] = (owner, compute())
    return kept.results[place][1]  # type: ignore[no-any-return]


def memoize_for(owner: object, subject: object, compute: Callable[[], _T]) -> _T:
    """Return what `compute` makes of parameters and subject, or the owner's latest result for the same object."""
    kept = _held.get()
    if kept is None:
        return compute()
    if id(owner) not in kept.latest or kept.latest[id(owner)][1] is not subject:
        kept.latest[id(owner)] = (owner, subject, compute())
    return kept.latest[id(owner)][2]  # type: ignore[no-any-return]


def checkpointed(function: Callable[..., _T], *args: Any, enabled: bool = True, **kwargs: Any) -> _T:
    """Call a function; if enabled, what it computes on the way is computed again in the backward pass instead of kept.

    It must have no side effects and no random numbers. Results of parameters alone (`memoize_step`) are kept: they are
    shared with calls outside and do not change. Those for a subject are not kept after the call, with gradients or
    without.
    """
    if not enabled:
        return function(*args, **kwargs)
    kept, call = _held.get(), carried_call()
    results = None if kept is None else kept.results
    if not torch.is_grad_enabled():
        with _holding(None if results is None else _Kept(results=results, called_again=True)):
            return function(*args, **kwargs)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return _called_again(results, call), _called_again(results, call)

    bound = functools.partial(function, **kwargs)
    result: _T = checkpoint(bound, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    return result


def in_pieces(
    function: Callable[[Tensor], _T], x: Tensor, *, piece: int, cube_frames: int | None = None
) -> Iterator[_T]:
    """Call a function of tokens, each by itself, for pieces of a sequence [B, N, ...]; a row [B, d] is one piece.

    What it computes on the way is computed again in the backward pass, for one piece at a time. Where video tokens are
    quantized with their neighbours, in cubes of so many frames, cubes stay whole, and each call has the grid of its
    piece (`core.tokens.cut_tokens`); such a sequence is [B, N, d], or else one piece.
    """
    if cube_frames is None:
        for part in torch.split(x, piece, dim=1) if x.ndim > 2 else [x]:
            yield checkpointed(function, part)
    elif x.ndim != 3:
        yield checkpointed(function, x)
    else:
        cut = cut_tokens(x.shape[1], current_grid(), piece=piece, cube_frames=cube_frames)
        for part, (_, grid) in zip(torch.split(x, [size for size, _ in cut], dim=1), cut, strict=True):
            yield _checkpointed_on(grid, function, part)


def _checkpointed_on(grid: TokenGrid | None, function: Callable[[Tensor], _T], part: Tensor) -> _T:
    with token_grid(grid):
        return checkpointed(function, part)


@contextmanager
def _holding(kept: _Kept | None) -> Iterator[None]:
    token = _held.set(kept)
    try:
        yield
    finally:
        _held.reset(token)


@contextmanager
def _called_again(results: _Results | None, call: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """The same results and token grid for a call and its repetition, which may run in a thread of the backward pass.

    Until then the context refers to results of parameters alone, not to the latest of the call that it is made in.
    """
    with _holding(None if results is None else _Kept(results=results, called_again=True)), call():
        yield


def saved_as_usual() -> AbstractContextManager[None]:
    """Keep what the backward pass needs, whatever the surrounding call does with saved tensors."""

    def same(tensor: Tensor) -> Tensor:
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(same, same)
