"""Packed linears of another program's values, for the transformer of a checkpoint.

Values are kept, with two exceptions: branches are rounded to bf16, as packed linears have them, and a row or group with
a scale of 0 gets codes of 0 and a scale of 1 (in a table, scales of groups of 0). Files of version 4 have bf16 scales
and transforms; where they would round one, the transformer gets a file of version 3, which has fp32 ones.

Shapes: `O/I` out/in features, `r` rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from s2q.checkpoint.values import value_problem
from s2q.common.errors import InvalidInputError
from s2q.core.packing import pack_codes
from s2q.core.qparams import align_scale
from s2q.core.schemes import LinearScheme
from s2q.core.stored_form import file_form, packed_dtypes, stored_values
from s2q.exports.target import CodedWeight, LinearForm, rotation_matrix, unrotated
from s2q.nn import PackedLinear
from s2q.nn.stored import frozen

_REMADE = 1e-5
"""Of the largest magnitude: a basis this near to what version 4 stores is that, rotated there and back in fp32."""


@dataclass(frozen=True, kw_only=True)
class Repacked:
    """A linear with the values of another program.

    Attributes:
        form: Name, shape, input path, and the scheme that the other program's file tells.
        scheme: That of the packed linear.
        tensors: By their names in a packed linear, not rounded yet.
        bias: [O], or None.
    """

    form: LinearForm
    scheme: LinearScheme
    tensors: Mapping[str, Tensor]
    bias: Tensor | None

    @property
    def is_narrow(self) -> bool:
        """Whether files of version 4 have its values, a branch apart whose columns have been rotated."""
        for name, value in self.tensors.items():
            allowed = _REMADE * float(value.abs().max()) if name == "low_rank_basis" else 0.0
            if name == "low_rank_weight" or not value.is_floating_point():
                continue
            difference = (stored_values(name, value).float() - value).abs().max()
            if not float(difference) <= allowed:
                return False
        return True

    def check(self) -> None:
        """Refuse values that a packed linear cannot have.

        Raises:
            InvalidInputError: If a value is not finite, or a scale not positive.
        """
        for name, value in self.tensors.items():
            stored = value.to(packed_dtypes()[name])
            if problem := value_problem(name, stored, self.scheme, in_features=self.form.in_features):
                raise InvalidInputError(f"{name} {problem}")

    def layer(self, *, wide: bool) -> PackedLinear:
        """Build the packed linear of checked values, as a file has them."""
        form = self.form
        layer = PackedLinear(
            form.in_features,
            form.out_features,
            bias=self.bias is not None,
            scheme=self.scheme,
            path=form.path,
            device="meta",
        )
        for name, value in self.tensors.items():
            stored = value.to(packed_dtypes()[name]) if wide else stored_values(name, value)
            setattr(layer, name, frozen(stored.contiguous()))
        if self.bias is not None:
            layer.bias = frozen(self.bias)
        return layer


def repacked(weight: CodedWeight, form: LinearForm, bias: Tensor | None, *, scheme: LinearScheme) -> Repacked:
    """Give the values of a linear, read by its form, the names of a packed linear of a scheme."""
    grouped, spread = align_scale(weight.codes, weight.scale)
    codes = torch.where(spread == 0, 0, grouped).to(torch.int8).reshape(weight.codes.shape)
    tensors = {
        "weight": pack_codes(codes, num_bits=scheme.weight.num_bits),
        "weight_scale": torch.where(weight.scale == 0, 1.0, weight.scale),
    }
    if weight.group_scale is not None:
        is_zero = (weight.scale == 0).unsqueeze(1)  # no code of a table is 0, its scale of a group is
        tensors["weight_group_scale"] = torch.where(is_zero, 0, weight.group_scale)
    if form.rotation is not None:
        tensors["transform_right"] = rotation_matrix(form.rotation).float()
    if weight.up is not None and weight.down is not None:
        tensors |= {"low_rank_basis": unrotated(weight.down, form).t(), "low_rank_weight": weight.up}
    return Repacked(form=form, scheme=scheme, tensors=tensors, bias=bias)


def packed_file(name: str, layer: PackedLinear, *, wide: bool) -> dict[str, Tensor]:
    """Return what the file of a transformer has of a linear, by full name."""
    tensors = {**layer.state_dict(), "weight": layer.packed_weight}
    written = file_form({f"{name}.{part}": tensor.detach() for part, tensor in tensors.items()}, wide=wide)
    return {part: tensor.contiguous() for part, tensor in written.items()}
