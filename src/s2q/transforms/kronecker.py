"""Learnable Kronecker transform, invertible by construction (FlatQuant, Sun et al., 2024, section 3).

    T = P₁ ⊗ P₂,    P = U · diag(σ) · Vᵀ,    U = Q₀ · cayley(A_U),   V = cayley(A_V),   σ = exp(log σ)
    cayley(A) = (I - A)(I + A)⁻¹  with A skew-symmetric: orthogonal for every A, and the identity at A = 0

At the start A = 0 and σ = 1, so that P = Q₀, a fixed orthogonal matrix. P⁻ᵀ = U · diag(1/σ) · Vᵀ needs no inversion
of P.

Shapes: `I` in features, `n1`·`n2` = I, `n` order of one factor; a skew matrix has n(n - 1)/2 free entries.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from s2q.common.errors import InvalidInputError, unknown_name
from s2q.core.memo import memoize_step
from s2q.transforms.base import Factors, Transform
from s2q.transforms.hadamard import best_factors, block_order, orthogonal_matrix, random_signs


def _hadamard_start(order: int, seed: int) -> Tensor:
    return random_signs(order, seed)[:, None] * orthogonal_matrix(order)


def _random_start(order: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(order, order, generator=generator, dtype=torch.float64))
    haar: Tensor = q * r.diagonal().sign()  # the same matrix whatever signs the QR routine prefers
    return haar


def _identity_start(order: int, seed: int) -> Tensor:
    return torch.eye(order, dtype=torch.float64)


STARTS: dict[str, Callable[[int, int], Tensor]] = {
    "hadamard": _hadamard_start,
    "random": _random_start,
    "identity": _identity_start,
}
"""Orthogonal starts of a factor by name: a function of order and seed, fp64 [n, n]."""


class KroneckerTransform(Transform):
    """T = P₁ ⊗ P₂, at the start two given matrices; InvalidInputError if one of them is not orthogonal.

    Args:
        start_left: [n1, n1], or n1 for P₁ = 1, which is not learned.
        start_right: [n2, n2].
    """

    def __init__(self, start_left: Tensor | int, start_right: Tensor) -> None:
        blocks = start_left if isinstance(start_left, int) else start_left.shape[0]
        super().__init__(blocks * start_right.shape[0])
        self.left = None if isinstance(start_left, int) else _Factor(start_left)
        self.right = _Factor(start_right)

    @classmethod
    def build(
        cls, in_features: int, *, seed: int = 0, start: str = "hadamard", block_size: int | None = None
    ) -> "KroneckerTransform":
        """Make the transform for a number of features, split by `best_factors`; the start is one of `STARTS`.

        With a block size P₁ = 1 and P₂ has `block_order`.
        """
        if start not in STARTS:
            raise unknown_name("start of a Kronecker transform", start, STARTS)
        make = STARTS[start]
        if block_size is not None:
            n2 = block_order(in_features, block_size)
            return cls(in_features // n2, make(n2, seed + 1))
        n1, n2 = best_factors(in_features)
        return cls(make(n1, seed), make(n2, seed + 1))

    def factors(self, dtype: torch.dtype, *, inverse_transpose: bool = False) -> Factors:
        """Return the factors of T or T⁻ᵀ; see `Transform.factors`."""
        left, right = (
            None if factor is None else factor.matrix(dtype, inverse_transpose=inverse_transpose)
            for factor in (self.left, self.right)
        )
        return Factors(left=left, right=right)


class _Factor(nn.Module):
    """P = U · diag(σ) · Vᵀ; parameters fp32 `skew_u`, `skew_v` [n(n - 1)/2] and `log_sigma` [n], zero at the start."""

    start: Tensor

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        order = start.shape[0]
        value = start.detach().double()
        deviation = (value @ value.t() - torch.eye(order, dtype=torch.float64, device=value.device)).abs().max()
        if not float(deviation) < 1e-6:
            raise InvalidInputError(f"Kronecker factor of order {order}: its start is not orthogonal")
        self.register_buffer("start", value)
        free = order * (order - 1) // 2
        self.skew_u = nn.Parameter(torch.zeros(free, device=value.device))
        self.skew_v = nn.Parameter(torch.zeros(free, device=value.device))
        self.log_sigma = nn.Parameter(torch.zeros(order, device=value.device))

    def matrix(self, dtype: torch.dtype, *, inverse_transpose: bool) -> Tensor:
        u, v = memoize_step(self, dtype, lambda: self._orthogonal(dtype))
        log_sigma = self.log_sigma.to(dtype)
        return (u * (-log_sigma if inverse_transpose else log_sigma).exp()) @ v.t()

    def _orthogonal(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        order = self.log_sigma.shape[0]
        u, v = cayley(torch.stack([self.skew_u, self.skew_v]).to(dtype), order).unbind(0)
        return self.start.to(dtype) @ u, v


def cayley(free: Tensor, order: int) -> Tensor:
    """Map free entries to orthogonal matrices [..., n, n] of determinant 1, (I - A)(I + A)⁻¹.

    The entries [..., n(n - 1)/2] are those of the skew-symmetric A above its diagonal, row by row.
    """
    rows, columns = torch.triu_indices(order, order, offset=1, device=free.device).unbind(0)
    upper = free.new_zeros(*free.shape[:-1], order, order)
    upper[..., rows, columns] = free
    skew = upper - upper.transpose(-1, -2)
    eye = torch.eye(order, dtype=free.dtype, device=free.device)
    rotation: Tensor = torch.linalg.solve(eye + skew, eye - skew)  # the two commute: their order does not matter
    return rotation
