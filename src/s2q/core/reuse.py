"""Computing once what several readers need while parameters stand still.

The linears that read one input share its transform, and each of them asks for the same rotated input and the same
inverse. Within `parameters_held` such results are kept; outside, nothing is.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

_T = TypeVar("_T")
_LATEST = object()
_held: ContextVar[dict[tuple[int, Hashable], tuple[object, Any]] | None] = ContextVar("held", default=None)


@contextmanager
def parameters_held() -> Iterator[None]:
    """Keep the results of `once` until the context ends; no parameter may change within it.

    A training step is a good context: its forward and backward pass. Results are kept with their graphs, so that a
    shared one gets the gradients of all of its readers.
    """
    token = _held.set({})
    try:
        yield
    finally:
        _held.reset(token)


def once(owner: object, key: Hashable, compute: Callable[[], _T]) -> _T:
    """Return what `compute` returns, from an earlier call of the same owner and key where one is kept.

    Args:
        owner: The object that the result belongs to; kept alive with it.
        key: Which of its results.
        compute: Computes it from the owner's parameters and what the key says, nothing else.
    """
    kept = _held.get()
    if kept is None:
        return compute()
    place = (id(owner), key)
    if place not in kept:
        kept[place] = (owner, compute())
    return kept[place][1]  # type: ignore[no-any-return]


def once_for(owner: object, subject: object, compute: Callable[[], _T]) -> _T:
    """Return what `compute` returns for a subject, from the owner's latest call where the subject was the same object.

    Args:
        owner: The object that the result belongs to.
        subject: What the result was computed from, compared by identity; only the latest is kept.
        compute: Computes it from the owner's parameters and the subject.
    """
    kept = _held.get()
    if kept is None:
        return compute()
    place = (id(owner), _LATEST)
    if place not in kept or kept[place][1][0] is not subject:
        kept[place] = (owner, (subject, compute()))
    return kept[place][1][1]  # type: ignore[no-any-return]
