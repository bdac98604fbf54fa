"""A format that `s2q convert` reads: what its files say of a linear, and the values that they have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from s2q.core.input_path import InputPath
from s2q.core.schemes import UNIFORM, LinearScheme, PerChannel, PerGroup, PerToken, QuantScheme
from s2q.exports.target import CodedWeight, LinearForm, Tensors


@dataclass(frozen=True, kw_only=True)
class SourceFormat:
    """A format of another program.

    Attributes:
        name: Of the program.
        version: Of the program that the reader was compared with.
        remedy: What to ask of the program for a file that is read, in a few words.
        form: Takes a linear and its name, its stored tensors, what the file says of it, and the dtype of the model's
            compute. InvalidInputError with what does not fit a packed linear, without the name.
        weight: Takes the tensors and the form; the values.
        few_rows_unquantized: Whether the program leaves inputs of few rows unquantized. adaLN linears and those outside
            the blocks become weight-only then.
    """

    name: str
    version: str
    remedy: str
    form: Callable[[str, nn.Linear, Tensors, Mapping[str, Any], torch.dtype], LinearForm]
    weight: Callable[[Tensors, LinearForm], CodedWeight]
    few_rows_unquantized: bool = False


def coded_form(
    name: str,
    linear: nn.Linear,
    *,
    num_bits: int,
    activation_bits: int | None,
    dtype: torch.dtype,
    groups: int = 1,
    levels: str = UNIFORM,
    rotation: int | None = None,
    rank: int | None = None,
) -> LinearForm:
    """Describe a linear with codes; `groups` is the number of scales of a row."""
    granularity = PerChannel() if groups == 1 else PerGroup(group_size=linear.in_features // groups)
    activation = None
    if activation_bits is not None:
        activation = QuantScheme(num_bits=activation_bits, granularity=PerToken(), dynamic=True)
    return LinearForm(
        name=name,
        in_features=linear.in_features,
        out_features=linear.out_features,
        scheme=LinearScheme(
            weight=QuantScheme(num_bits=num_bits, granularity=granularity, levels=levels), activation=activation
        ),
        path=InputPath(right=rotation, low_rank=rank, deflates=rank is None),
        dtype=dtype,
    )
