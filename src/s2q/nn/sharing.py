"""Quantizing once what several linears read: q, k and v of an attention get the same tensor, one after another.

The result is kept beside the tensor that it was computed from, compared by identity and version, until every reader had
it or the tensor is gone. A model that is called otherwise, one of the linears alone, or with another tensor each,
computes what it would have computed without sharing.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from s2q.core.input_path import stored_tensors
from s2q.nn.stored import QuantizedInput, StoredLinear

_T = TypeVar("_T")


class SharedInput(Generic[_T]):
    """Values that linears with the same input compute from it once.

    Args:
        readers: How many linears there are.
    """

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self._kept: tuple[weakref.ref[Tensor], int, _T] | None = None
        self._traced: tuple[Tensor, _T] | None = None
        self._left = 0

    def __call__(self, x: Tensor, compute: Callable[[], _T]) -> _T:
        """Return what `compute` returns for x, from an earlier reader where it was the same tensor, unchanged.

        Nothing is kept of inference tensors, which do not count their changes.
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


def share_inputs(model: nn.Module) -> int:
    """Let sibling linears with the same transform and quantization share the codes of their input, in place.

    Siblings are the packed linears of one parent module, such as to_q, to_k and to_v of an attention. Whether they do
    read the same tensor is seen at every call (`SharedInput`), so that a wrong guess costs nothing but a comparison.
    Returns how many linears share.
    """
    count = 0
    for parent in model.modules():
        linears = [child for child in parent.children() if isinstance(child, StoredLinear)]
        siblings = [linear for linear in linears if linear.scheme.activation is not None and not linear.simulated]
        for linear in siblings:
            linear.shared_input = None
        for group in _groups(siblings):
            shared: SharedInput[QuantizedInput] = SharedInput(len(group))
            for linear in group:
                linear.shared_input = shared
            count += len(group)
    return count


def _groups(linears: list[StoredLinear]) -> list[list[StoredLinear]]:
    """Those that would compute the same from the same input, at least two each."""
    names = [name for name, tensor in stored_tensors().items() if not tensor.of_linear]

    def alike(first: StoredLinear, second: StoredLinear) -> bool:
        same = all(getattr(first, name) == getattr(second, name) for name in ("in_features", "path"))
        tensors = ([linear._parameters.get(name) for name in names] for linear in (first, second))
        return same and first.scheme.activation == second.scheme.activation and same_tensors(*tensors)

    groups: list[list[StoredLinear]] = []
    for linear in linears:
        group = next((group for group in groups if alike(group[0], linear)), None)
        if group is None:
            groups.append([linear])
        else:
            group.append(linear)
    return [group for group in groups if len(group) > 1]


def same_tensors(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> bool:
    """Tell whether two lists of tensors are equal, bit for bit; on the meta device they equal only themselves."""
    return all(a is b or _equal(a, b) for a, b in zip(first, second, strict=True))


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.is_meta or b.is_meta or a.device != b.device:
        return False
    return torch.equal(a, b)
