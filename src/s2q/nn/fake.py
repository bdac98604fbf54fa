"""The trainable twin of a packed linear: quantization errors in the forward pass, straight-through gradients.

    y = fake_quantize(x) · fake_quantize(W)ᵀ + b

Shapes: `I` in features, `O` out features.
"""

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2q.core.qparams import ClipRatio, RoundedWeight, fake_quantize, fake_quantize_weight, token_scale, weight_scale
from s2q.core.schemes import LinearScheme, num_groups
from s2q.nn.packed import PackedLinear


class FakeQuantLinear(nn.Module):
    """A linear whose input and weight pass through fake quantization; weight and bias are trainable.

    Its scales follow the weight and the input in every call. In fp32 its output equals, to rounding, that of the
    `PackedLinear` that `pack` makes of it with rounding to nearest.

    Attributes:
        weight: [O, I], floating.
        bias: [O] or None.
        scheme: How weight and input are quantized.

    Args:
        weight: [O, I], floating; copied.
        bias: [O] or None; copied.
        scheme: How weight and input are quantized.

    Raises:
        InvalidInputError: If I is not a multiple of the group size.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, scheme: LinearScheme) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        num_groups(scheme.weight, self.in_features)
        self.scheme = scheme
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: LinearScheme) -> Self:
        """Make the twin of a full-precision linear, with copies of its weight and bias.

        Args:
            linear: Full precision.
            scheme: How weight and input are to be quantized.

        Returns:
            The twin, on the same device and in the same dtype.

        Raises:
            InvalidInputError: If I is not a multiple of the group size.
        """
        return cls(linear.weight, linear.bias, scheme=scheme)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name in nn.Linear)
        """Apply the layer.

        Args:
            input: [..., I], floating.

        Returns:
            [..., O] in the dtype of the input.
        """
        weight_scheme, activation = self.scheme.weight, self.scheme.activation
        weight = fake_quantize_weight(
            self.weight, weight_scale(self.weight, weight_scheme), num_bits=weight_scheme.num_bits
        )
        if activation is not None:
            scale = token_scale(input, num_bits=activation.num_bits)
            input = fake_quantize(input, scale, num_bits=activation.num_bits)
        return F.linear(input, weight, self.bias)

    def pack(
        self,
        rounding: Callable[..., RoundedWeight],
        *,
        clip_ratio: ClipRatio = None,
        dtype: torch.dtype | None = None,
    ) -> PackedLinear:
        """Round and pack the weight.

        Args:
            rounding: A method of `s2q.rounding`, called as `rounding(weight, scheme.weight, clip_ratio=clip_ratio)`.
            clip_ratio: Factor in (0, 1] on the largest magnitude: a float, or a tensor that broadcasts to the scale.
            dtype: Of the bias; None keeps it.

        Returns:
            The packed layer, on the same device.
        """
        rounded = rounding(self.weight.detach(), self.scheme.weight, clip_ratio=clip_ratio)
        return PackedLinear.from_rounded(rounded, bias=self.bias, scheme=self.scheme, dtype=dtype)

    def extra_repr(self) -> str:
        """Return what `print` shows of the layer."""
        has_bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={has_bias}, {self.scheme.name}"
