"""The packed linear of a text encoder, whose classes in transformers ask a linear for its `weight`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from s2q.nn.packed import PackedLinear

PACKED = "packed"
"""Attribute of an `EncoderLinear`, and the last part of the names of its tensors in files but their own."""


class _NoTensor:
    """In place of a weight or bias that is not to be read, and that transformers is not to draw anew."""

    _is_hf_initialized = True


class EncoderLinear(nn.Module):
    """A packed linear whose codes nobody takes for a weight: T5 casts its input to the dtype of the tensor `wo.weight`.

    Attributes:
        packed: The linear.
        weight: No tensor.
        bias: No tensor, also where there is no bias; some classes draw the biases of their linears by name.
        in_fp32: Whether the class keeps the linear in fp32 in an fp16 model: fp16 inputs are computed in fp32 then, and
            so is what is returned, as T5 does for `wo`, whose outputs exceed fp16.
    """

    weight = _NoTensor()
    bias = _NoTensor()

    def __init__(self, packed: PackedLinear, *, in_fp32: bool = False) -> None:
        super().__init__()
        self.packed, self.in_fp32 = packed, in_fp32
        for module in (self, packed):  # transformers would draw its parameters anew
            module._is_hf_initialized = True  # type: ignore[assignment]
        for parameter in packed.parameters():
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name in nn.Linear)
        """Apply the linear to [..., I], floating."""
        if self.in_fp32 and input.dtype == torch.float16:
            input = input.float()  # noqa: A001
        output: Tensor = self.packed(input)
        return output
