"""A channel scale followed by any other transform: T = diag(v) · T₂, and T⁻ᵀ = diag(1/v) · T₂⁻ᵀ."""

import torch
from torch import Tensor

from s2q.common.errors import InvalidInputError
from s2q.transforms.base import Factors, Transform


class Compose(Transform):
    """First a channel scale, then another transform (FlatQuant's order: the diagonal goes first).

    Raises:
        InvalidInputError: If the first is not diagonal or the sizes differ.
    """

    def __init__(self, first: Transform, second: Transform) -> None:
        super().__init__(first.in_features)
        if first.in_features != second.in_features:
            raise InvalidInputError(
                f"Compose: got transforms of {first.in_features} and {second.in_features} features; expected equal"
            )
        if set(first.state_tensors()) - {"scale"}:
            raise InvalidInputError(
                f"Compose: {type(first).__name__} is not diagonal; put the channel scale first and the rotation second"
            )
        self.first = first
        self.second = second

    def factors(self, dtype: torch.dtype, *, inverse_transpose: bool = False) -> Factors:
        """Return the factors of T or T⁻ᵀ; see `Transform.factors`."""
        first, second = (part.factors(dtype, inverse_transpose=inverse_transpose) for part in (self.first, self.second))
        return Factors(scale=_product(first.scale, second.scale), left=second.left, right=second.right)


def _product(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first * second
