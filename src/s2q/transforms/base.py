"""Interface of a transform: applied to an input, its inverse folded into a weight, stored.

    T = diag(v) · (A ⊗ B)        T⁻ᵀ = diag(1/v) · (A⁻ᵀ ⊗ B⁻ᵀ)        (x T) · (W T⁻ᵀ)ᵀ = x Wᵀ

Shapes: `I` in features, `O` out features, `n1`·`n2` = I.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2q.common.errors import InvalidInputError
from s2q.core.input_path import PREFIX
from s2q.core.memo import memoize_step
from s2q.core.stored_form import stored_values
from s2q.ops.kronecker import factor_orders, scaled_kronecker

_NAMES = ("scale", "left", "right")


@dataclass(frozen=True, kw_only=True)
class Factors:
    """The parts of diag(scale [I]) · (left [n1, n1] ⊗ right [n2, n2]); None is the identity."""

    scale: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """Multiply rows x [..., I] by the matrix, in the wider dtype of x and the factors."""
        return scaled_kronecker(x, scale=self.scale, left=self.left, right=self.right)

    def tensors(self) -> dict[str, Tensor]:
        """Return the parts that are there, by name, detached: what a checkpoint stores."""
        parts = zip(_NAMES, (self.scale, self.left, self.right), strict=True)
        return {name: part.detach() for name, part in parts if part is not None}


class Transform(nn.Module):
    """An invertible linear map T of a linear's input; subclasses give its factors and those of T⁻ᵀ.

    What is learnable is a parameter, what is fixed is a buffer.
    """

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.in_features = in_features

    def factors(self, dtype: torch.dtype, *, inverse_transpose: bool = False) -> Factors:
        """Return the factors of T, or of T⁻ᵀ, differentiable, computed in fp32 or fp64."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Apply the transform, x T, to [..., I]; fp64 for an fp64 x, else fp32."""
        return self._step_factors(_compute_dtype(x)).apply(x.to(_compute_dtype(x)))

    def scaled(self, x: Tensor) -> Tensor:
        """Apply the first half of the transform, x diag(v); as `forward`."""
        factors = self._step_factors(_compute_dtype(x))
        return Factors(scale=factors.scale).apply(x.to(_compute_dtype(x)))

    def rotated(self, x: Tensor) -> Tensor:
        """Apply the second half of the transform, x (A ⊗ B); as `forward`."""
        factors = self._step_factors(_compute_dtype(x))
        return Factors(left=factors.left, right=factors.right).apply(x.to(_compute_dtype(x)))

    def unscaled(self, weight: Tensor, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """Put the inverse of the first half into a weight, W diag(1/v), for `scaled` inputs; see `fold_inverse`."""
        return Factors(scale=self._step_factors(dtype, inverse_transpose=True).scale).apply(weight.to(dtype))

    def fold_inverse(self, weight: Tensor, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """Put the inverse into a weight [O, I], W T⁻ᵀ, differentiable, so that (x T) · (W T⁻ᵀ)ᵀ = x Wᵀ.

        It is computed and returned in `dtype`: fp64 for the weight that is rounded in the end, fp32 does while
        training.

        Raises:
            InvalidInputError: If the weight has another number of in features.
        """
        if weight.shape[-1] != self.in_features:
            raise InvalidInputError(
                f"{type(self).__name__}: got a weight with in_features={weight.shape[-1]}; expected {self.in_features}"
            )
        return self._step_factors(dtype, inverse_transpose=True).apply(weight.to(dtype))

    def _step_factors(self, dtype: torch.dtype, *, inverse_transpose: bool = False) -> Factors:
        """Return the factors, computed once in a step of memoization."""
        compute = functools.partial(self.factors, dtype, inverse_transpose=inverse_transpose)
        return memoize_step(self, ("factors", dtype, inverse_transpose), compute)

    @torch.no_grad()
    def rounded(self) -> "FixedTransform":
        """Return a fixed transform: the factors of T rounded to the stored dtype, and their T⁻ᵀ."""
        factors = self.factors(torch.float64).tensors()
        rounded = {name: stored_values(PREFIX + name, tensor).double() for name, tensor in factors.items()}
        return FixedTransform(self.in_features, Factors(**rounded))

    @torch.no_grad()
    def state_tensors(self) -> dict[str, Tensor]:
        """Return fp32 `scale` [I], `left` [n1, n1] and `right` [n2, n2], without those that are the identity."""
        tensors = self.factors(torch.float64).tensors()
        return {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}


class FixedTransform(Transform):
    """A transform that is not learned, from factors, which are copied in fp64.

    Raises:
        InvalidInputError: If the factors do not fit I, are not finite, or are not invertible.
    """

    def __init__(self, in_features: int, factors: Factors) -> None:
        super().__init__(in_features)
        _check_shapes(in_features, factors)
        for name, tensor in factors.tensors().items():
            value = tensor.double()
            self.register_buffer(name, value.clone())
            self.register_buffer(f"inverse_{name}", _inverse_transpose(name, value))

    def factors(self, dtype: torch.dtype, *, inverse_transpose: bool = False) -> Factors:
        """Return the factors of T or T⁻ᵀ; see `Transform.factors`."""
        prefix, buffers = "inverse_" if inverse_transpose else "", dict(self.named_buffers(recurse=False))
        return Factors(**{name: buffers[prefix + name].to(dtype) for name in _NAMES if prefix + name in buffers})


def identity(in_features: int, *, seed: int = 0, block_size: int | None = None) -> FixedTransform:
    """Return the transform that changes nothing; every rotation takes a seed and a block size."""
    return FixedTransform(in_features, Factors())


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _check_shapes(in_features: int, factors: Factors) -> None:
    for name, tensor in factors.tensors().items():
        ndim, expected = (1, "[I]") if name == "scale" else (2, "[n, n]")
        if tensor.ndim != ndim or tensor.shape[0] != tensor.shape[-1]:
            raise InvalidInputError(f"transform {name}: got shape {list(tensor.shape)}; expected {expected}")
    n1, n2 = factor_orders(in_features, factors.left, factors.right)
    if n1 * n2 != in_features:
        raise InvalidInputError(f"transform: factors of order {n1} and {n2}; expected n1 · n2 = {in_features}")
    if factors.scale is not None and factors.scale.shape[0] != in_features:
        raise InvalidInputError(f"transform scale: got {factors.scale.shape[0]} channels; expected {in_features}")


def _inverse_transpose(name: str, value: Tensor) -> Tensor:
    has_values = not value.is_meta  # a meta tensor, which memory is planned with, has a shape alone
    if has_values and not bool(value.isfinite().all()):
        raise InvalidInputError(f"transform {name}: contains NaN or infinite values; calibrate again")
    if value.ndim == 1:
        if has_values and bool((value == 0).any()):
            raise InvalidInputError(f"transform {name}: contains zeros, so it cannot be inverted; calibrate again")
        return 1 / value
    inverse, info = torch.linalg.inv_ex(value)
    if has_values and int(info) != 0:
        raise InvalidInputError(f"transform {name}: a singular matrix, it cannot be inverted; calibrate again")
    transposed: Tensor = inverse.t().contiguous()
    return transposed
