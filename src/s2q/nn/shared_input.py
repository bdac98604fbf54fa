"""Quantizing once what several linears read: q, k and v of an attention get the same tensor, one after another.

The result is kept beside the tensor that it was computed from, compared by identity and version, until every reader had
it or the tensor is gone. A model that is called otherwise, one of the linears alone, or with another tensor each,
computes what it would have computed without sharing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")


class SharedInput(Generic[_T]):
    """Values that linears with the same input compute from it once.

    Args:
        readers: How many linears there are.
    """

    _kept: tuple[weakref.ref[Tensor], int, _T] | None
    _traced: tuple[Tensor, _T] | None

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self._kept, self._traced, self._left = None, None, 0

    def get(self, x: Tensor, compute: Callable[[], _T]) -> _T:
        """Return what `compute` returns for x, from an earlier reader where it was the same tensor, unchanged.

        Nothing is kept of inference tensors, which do not count their changes.

        Args:
            x: The input.
            compute: Computes the result from x.
        """
        if torch.compiler.is_compiling():
            return self._get_traced(x, compute)
        if x.is_inference():
            return compute()
        kept = self._kept
        if kept is not None and kept[0]() is x and kept[1] == x._version:
            self._left -= 1
            if self._left <= 0:
                self._forget()
            return kept[2]
        result = compute()
        self._kept, self._left = (weakref.ref(x, self._forget), x._version, result), self.readers - 1
        return result

    def _get_traced(self, x: Tensor, compute: Callable[[], _T]) -> _T:
        """The same while torch.compile traces, which follows attributes and identity, but no weak references.

        Once all have read, nothing is kept, so that the graph has no side effect. A tensor that was changed in between
        would go unnoticed here: no family does that between its linears.
        """
        traced = self._traced
        if traced is not None and traced[0] is x:
            self._left -= 1
            if self._left <= 0:
                self._traced = None
            return traced[1]
        result = compute()
        self._traced, self._left = (x, result), self.readers - 1
        return result

    def _forget(self, _gone: object = None) -> None:
        self._kept, self._left = None, 0

    def __getstate__(self) -> dict[str, Any]:
        """Give copies of a model the sharing, and nothing that is kept."""
        return {"readers": self.readers, "_kept": None, "_traced": None, "_left": 0}


def same_tensors(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> bool:
    """Tell whether two lists of tensors are equal, bit for bit.

    Args:
        one: Tensors, None where there is none; on the meta device they equal only themselves.
        other: As many.
    """
    return all(a is b or _equal(a, b) for a, b in zip(one, other, strict=True))


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or one.is_meta or other.is_meta or one.device != other.device:
        return False
    return torch.equal(one, other)
