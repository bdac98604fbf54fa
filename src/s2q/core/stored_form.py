"""The form in which a tensor of a packed linear is stored: the one place where values are rounded to it.

Files have scales, shifts and transforms in bfloat16 and the bases of low-rank branches in float8 (e4m3). The entries of
a basis [I, r], of the order of 1 / √I, are multiplied by a power of two near √I. Layers have the same values in the
dtype that their kernels take. `stored_values` rounds a value once, before anything that depends on it is computed:
codes on a scale, a folded weight on a transform, a Hessian on a shift. Writing what it returned, and reading that back,
changes no bit.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from s2q.core.input_path import stored_tensors

FLOAT8 = torch.float8_e4m3fn
_LARGEST_UNIT = 256  # entries are at most 1, and float8 ends at 448
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E4M3": FLOAT8}


def packed_dtypes() -> dict[str, torch.dtype]:
    """Return the dtype of every tensor of a packed linear except its bias; `.to(dtype)` and the like keep it."""
    of_input = {name: _DTYPES[tensor.dtype] for name, tensor in stored_tensors().items()}
    return {"weight": torch.uint8, "weight_scale": torch.float32, "weight_group_scale": torch.int8, **of_input}


def file_dtypes(*, wide: bool = False) -> dict[str, torch.dtype]:
    """Return the dtype of the same tensors in files; `wide` returns those of files before format version 4."""
    if wide:
        return packed_dtypes()
    of_input = {name: _DTYPES[tensor.file_dtype] for name, tensor in stored_tensors().items()}
    return packed_dtypes() | {"weight_scale": torch.bfloat16, **of_input}


def stored_values(name: str, value: Tensor) -> Tensor:
    """Round a tensor of a packed linear, by its name there, to what files have.

    The gradient passes as if the value were not rounded. Values beyond the range of bfloat16 become infinite; those of
    a basis, whose columns are orthonormal, are in range.

    Returns:
        The values in the dtype of the layer, of the shape given; the argument itself where nothing is rounded.
    """
    file_dtype, dtype = file_dtypes()[name], packed_dtypes()[name]
    rounded = from_file(to_file(value.detach(), file_dtype), dtype)
    if not value.requires_grad:
        return rounded
    return (value + (rounded.to(value.dtype) - value.detach())).to(dtype)  # exact: the two are within a factor of two


def file_form(tensors: Mapping[str, Tensor], *, wide: bool = False) -> dict[str, Tensor]:
    """Return tensors of packed linears, whose names end in those in a linear, as files have them; a bias unchanged."""
    dtypes, parts = file_dtypes(wide=wide), {name: name.rpartition(".")[2] for name in tensors}
    return {
        name: to_file(tensor, dtypes[parts[name]]) if parts[name] in dtypes else tensor
        for name, tensor in tensors.items()
    }


def to_file(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor as a file has it in a dtype; float8 of [I, r] times a power of two."""
    return (value.float() * _unit(value)).to(dtype) if dtype == FLOAT8 else value.to(dtype)


def from_file(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what a file has in the dtype of the layer; undoes `to_file`."""
    return (value.float() / _unit(value)).to(dtype) if value.dtype == FLOAT8 else value.to(dtype)


def _unit(value: Tensor) -> float:
    return float(min(_LARGEST_UNIT, 2 ** (value.shape[0].bit_length() // 2)))
