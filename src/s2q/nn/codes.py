"""The codes of a packed linear: a parameter that anybody may move, copy, store and ask for its shape.

Adapters, fusing, pruning and the like read a linear's `weight` and compute with it. Codes are no weight: torch would
raise an unrelated error about uint8, or would change them and ruin the layer. Everything that is not listed below
raises one `UsageError` that names the layer and the remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor, nn

from s2q.common.errors import UsageError

_METADATA = frozenset(
    "size dim ndimension stride storage_offset numel nelement element_size is_contiguous is_floating_point is_complex "
    "is_conj is_neg is_signed is_inference is_pinned is_shared is_same_size _is_view get_device has_names "
    "data_ptr untyped_storage storage _typed_storage record_stream equal empty_like zeros_like ones_like __len__ "
    "__hash__ __format__ _has_compatible_shallow_copy_type".split()
)
_COPIES = frozenset(
    "data detach detach_ clone contiguous cpu cuda to pin_memory share_memory_ requires_grad_ copy_ module_load".split()
)
"""Their results are codes again."""

_VIEWS = frozenset("T H mT mH real imag".split())
"""Attributes that are no metadata."""


class PackedCodes(nn.Parameter):
    """A parameter of packed codes, uint8, without gradient.

    Attributes:
        plain: The same memory as a plain tensor, from which the layer computes.
        owner: The layer, for messages: "transformer_blocks.0.attn1.to_q, w4a6".

    Args:
        data: uint8, not copied.
        requires_grad: False; there for libraries that make parameters of the class of another one.
        plain: Ignored; likewise.

    Returns:
        The codes; a plain parameter where the data is of a class of its own (`DTensor`), which no other can guard.

    Raises:
        UsageError: If the data is not uint8.
    """

    plain: Tensor
    owner: str

    def __new__(cls, data: Tensor, requires_grad: bool = False, *, owner: str = "", plain: object = None) -> Self:
        """Make codes of uint8 data."""
        if data.dtype != torch.uint8 or requires_grad:
            raise refusal(owner)
        if type(data) not in (Tensor, nn.Parameter, cls):
            return nn.Parameter(data, requires_grad=False)  # type: ignore[return-value]
        with torch._C.DisableTorchFunctionSubclass():
            codes = torch.Tensor._make_subclass(cls, data, False)
            codes.owner, codes.plain = owner, codes.detach()
        return codes

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Carry out what is on the list, refuse everything else."""
        name, kwargs = func.__name__, kwargs or {}
        if name in ("__get__", "__set__"):
            attribute = func.__self__.__name__  # type: ignore[attr-defined]
            allowed = attribute not in _VIEWS if name == "__get__" else _may_set(attribute, *args)
            is_codes = attribute in _COPIES
            if (name, attribute) == ("__get__", "data"):  # whose version would not count in-place changes of the codes
                func, args = Tensor.detach, args[:1]
        elif name == "numpy":  # for offloading to a disk; not the memory itself, which could be changed unseen
            func, allowed, is_codes = _copied_to_numpy, True, False
        else:
            is_codes = name in _COPIES
            allowed = _may_copy(name, args) if is_codes else name in _METADATA
        if not allowed:
            raise refusal(_owner([*args, *kwargs.values()]))
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            if name == "__set__":
                args[0].plain = args[0].detach()
        if not is_codes or not isinstance(result, Tensor) or result is args[0]:
            return result
        return PackedCodes(result, owner=_owner(args))  # refuses another dtype

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Return class, shape and device."""
        return f"{type(self).__name__}({list(self.shape)}, device='{self.device}')"

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedCodes:
        """Return codes in memory of their own."""
        if id(self) not in memo:
            memo[id(self)] = PackedCodes(self.plain.clone(memory_format=torch.preserve_format), owner=self.owner)
        copied: PackedCodes = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as a plain tensor: files that `torch.save` writes name no class of this package."""
        return self.plain.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def refusal(owner: str) -> UsageError:
    """Return the error for computing with the codes of `owner` (see `PackedCodes`)."""
    return UsageError(
        f"{owner or 'a quantized linear'}: packed codes cannot be merged, fused, pruned, cast or computed with; call "
        "dequantize() on the transformer first, or attach a plain LoRA adapter and leave it unmerged"
    )


def reads_as_weight(caller: FrameType) -> bool:
    """Tell whether a frame asks a weight for its dtype or shape first, and would fail later for no clear reason."""
    package, function = str(caller.f_globals.get("__name__", "")), caller.f_code.co_name
    if package.partition(".")[0] == "peft":
        return function.endswith("_init") or package in ("peft.tuners.loha.layer", "peft.tuners.lokr.layer")
    return package.startswith("torch.nn.utils.")  # parametrizations, which may delete the weight before they compute


def _may_copy(name: str, args: tuple[Any, ...]) -> bool:
    if name == "requires_grad_":
        return len(args) > 1 and args[1] is False
    if name not in ("copy_", "module_load"):
        return True
    into, source = args[0], args[1]
    return bool(into.dtype == source.dtype == torch.uint8 and into.shape == source.shape)


def _may_set(attribute: str, codes: PackedCodes, value: Any) -> bool:
    if attribute == "data":
        return bool(value.dtype == torch.uint8 and value.shape == codes.shape)
    return (attribute == "requires_grad" and value is False) or (attribute == "grad" and value is None)


def _copied_to_numpy(codes: PackedCodes, **options: Any) -> Any:
    return codes.plain.numpy(**options).copy()


def _owner(args: Iterable[Any]) -> str:
    """The owner of the first codes among the arguments."""
    for argument in args:
        if isinstance(argument, PackedCodes):
            return argument.owner
        if isinstance(argument, list | tuple) and (owner := _owner(argument)):
            return owner
    return ""
