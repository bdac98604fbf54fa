"""The form in which a tensor of a packed linear is stored: the one place where values are rounded to it.

Files have scales, shifts and transforms in bfloat16 and the bases of low-rank branches in float8 (e4m3). The entries of
a basis [I, r], of the order of 1 / √I, are multiplied by a power of two near √I. Layers have the same values in the
dtype that their kernels take. `stored_values` rounds a value once, before anything that depends on it is computed:
codes on a scale, a folded weight on a transform, a Hessian on a shift. Writing what it returned, and reading that back,
changes no bit.
"""

import functools
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from s2q.common.errors import InvalidInputError
from s2q.common.headers import DTYPES
from s2q.core.input_path import PARTS, InputPart, tensors_of

FLOAT8 = torch.float8_e4m3fn
_LARGEST_UNIT = 256  # entries are at most 1, and float8 ends at 448
_OF_WEIGHT = {
    "weight": (torch.uint8, torch.uint8),
    "weight_scale": (torch.float32, torch.bfloat16),
    "weight_group_scale": (torch.int8, torch.int8),
}
"""Dtypes in a layer and in files."""


def packed_dtypes() -> Mapping[str, torch.dtype]:
    """Return the dtype of every tensor of a packed linear except its bias; `.to(dtype)` and the like keep it."""
    return _dtypes(tuple(PARTS.values()))[0]


def file_dtypes(*, wide: bool = False) -> Mapping[str, torch.dtype]:
    """Return the dtype of the same tensors in files; `wide` returns those of files before format version 4."""
    return packed_dtypes() if wide else _dtypes(tuple(PARTS.values()))[1]


@functools.lru_cache(maxsize=2)  # parts may be added at any time
def _dtypes(parts: tuple[InputPart, ...]) -> tuple[Mapping[str, torch.dtype], Mapping[str, torch.dtype]]:
    """The dtypes in layers and those in files."""
    of_input = {name: (DTYPES[tensor.dtype], DTYPES[tensor.file_dtype]) for name, tensor in tensors_of(parts).items()}
    packed, written = (
        MappingProxyType({name: pair[place] for name, pair in (_OF_WEIGHT | of_input).items()}) for place in (0, 1)
    )
    return packed, written


def stored_values(name: str, value: Tensor) -> Tensor:
    """Round a tensor of a packed linear, by its name there, to what files have.

    The gradient passes as if the value were not rounded. Values beyond the range of bfloat16 become infinite; those of
    a basis, whose columns are orthonormal, are in range.

    Returns:
        The values in the dtype of the layer, of the shape given; the argument itself where nothing is rounded.
    """
    file_dtype, dtype = file_dtypes()[name], packed_dtypes()[name]
    if file_dtype == dtype:
        return value.to(dtype)
    rounded = from_file(to_file(value.detach(), file_dtype), dtype)
    if not value.requires_grad:
        return rounded
    return (value + (rounded.to(value.dtype) - value.detach())).to(dtype)  # exact: the two are within a factor of two


def file_form(tensors: Mapping[str, Tensor], *, wide: bool = False) -> dict[str, Tensor]:
    """Return tensors of packed linears, whose names end in those in a linear, as files have them; a bias unchanged.

    Raises:
        InvalidInputError: If a file would have other values than a tensor.
    """
    dtypes, written = file_dtypes(wide=wide), dict(tensors)
    for name, tensor in tensors.items():
        part = name.rpartition(".")[2]
        if part not in dtypes:
            continue
        written[name] = to_file(tensor, dtypes[part])
        if dtypes[part] == packed_dtypes()[part] or tensor.is_meta:
            continue
        if not torch.equal(from_file(written[name], tensor.dtype), tensor):
            raise InvalidInputError(
                f"{name}: got values that {dtypes[part]}, in which files have them, would change; expected values "
                f"rounded to it; set it to stored_values({part!r}, ...), or quantize the model again"
            )
    return written


def to_file(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor as a file has it in a dtype; float8 of [I, r] times a power of two."""
    return (value.float() * _unit(value)).to(dtype) if dtype == FLOAT8 else value.to(dtype)


def from_file(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what a file has in the dtype of the layer; undoes `to_file`."""
    return (value.float() / _unit(value)).to(dtype) if value.dtype == FLOAT8 else value.to(dtype)


def _unit(value: Tensor) -> float:
    return float(min(_LARGEST_UNIT, 2 ** (value.shape[0].bit_length() // 2)))
