"""Learnable Kronecker transform, invertible by construction (FlatQuant, Sun et al., 2024, section 3).

    T = P₁ ⊗ P₂,    P = U · diag(σ) · Vᵀ,    U = Q₀ · cayley(A_U),   V = cayley(A_V),   σ = exp(log σ)
    cayley(A) = (I - A)(I + A)⁻¹  with A skew-symmetric: orthogonal for every A, and the identity at A = 0

At the start A = 0 and σ = 1, so that P = Q₀, a fixed orthogonal matrix. P⁻ᵀ = U · diag(1/σ) · Vᵀ needs no inversion
of P.

Shapes: `I` in features, `n1`·`n2` = I, `n` order of one factor; a skew matrix has n(n - 1)/2 free entries.
"""

from collections.abc import Callable, Sequence
from typing import Any

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
            None if factor is None else factor.matrices(dtype)[inverse_transpose] for factor in (self.left, self.right)
        )
        return Factors(left=left, right=right)


class _Factor(nn.Module):
    """P = U · diag(σ) · Vᵀ; parameters fp32 `skew_u`, `skew_v` [n(n - 1)/2] and `log_sigma` [n], zero at the start.

    `batch` has the factors of its order that are computed together, itself among them.
    """

    start: Tensor
    upper: Tensor
    batch: list["_Factor"]

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        order = start.shape[0]
        value = start.detach().double()
        deviation = (value @ value.t() - torch.eye(order, dtype=torch.float64, device=value.device)).abs().max()
        if not float(deviation) < 1e-6:
            raise InvalidInputError(f"Kronecker factor of order {order}: its start is not orthogonal")
        self.register_buffer("start", value)
        self.register_buffer("upper", _upper(order, value.device), persistent=False)
        free = order * (order - 1) // 2
        self.skew_u = nn.Parameter(torch.zeros(free, device=value.device))
        self.skew_v = nn.Parameter(torch.zeros(free, device=value.device))
        self.log_sigma = nn.Parameter(torch.zeros(order, device=value.device))
        vars(self)["batch"] = [self]  # not submodules: the parameters of the others are not this one's

    def matrices(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return P and P⁻ᵀ."""
        pairs = memoize_step(self.batch, dtype, lambda: _matrices(self.batch, dtype))
        return pairs[self.batch.index(self)]


def batch_factors(module: nn.Module) -> None:
    """Have the factors of equal order inside a module compute their matrices together, in a step of memoization."""
    by_order: dict[int, list[_Factor]] = {}
    for factor in module.modules():
        if isinstance(factor, _Factor):
            vars(factor)["batch"] = by_order.setdefault(len(factor.start), [])
            factor.batch.append(factor)


def _matrices(batch: Sequence[_Factor], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    skew = torch.stack([part for factor in batch for part in (factor.skew_u, factor.skew_v)]).to(dtype)
    sigma = torch.stack([factor.log_sigma for factor in batch]).to(dtype)
    start = torch.stack([factor.start for factor in batch]).to(dtype)
    stacked: tuple[Tensor, Tensor] = _FactorPairs.apply(skew, sigma, start, batch[0].upper)  # type: ignore[no-untyped-call]
    return list(zip(*(part.unbind(0) for part in stacked), strict=True))


class _FactorPairs(torch.autograd.Function):
    """P and P⁻ᵀ of several factors: few operations on small matrices, whose number is what takes time.

    With M = (I + A)⁻¹, cayley(A) = 2 M - I, and the gradient G of it gives -2 Mᵀ G Mᵀ towards A.
    """

    @staticmethod
    def forward(ctx: Any, skew: Tensor, log_sigma: Tensor, start: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        rotations, inverse = _cayley(skew, upper, start.shape[-1])
        rotations, sigma = rotations.view(len(start), 2, *start.shape[1:]), log_sigma.exp().unsqueeze(1)
        u, v = start @ rotations[:, 0], rotations[:, 1]
        ctx.save_for_backward(inverse, u, v, sigma, start, upper)
        return (u * sigma) @ v.mT, (u / sigma) @ v.mT

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        inverse, u, v, sigma, start, upper = ctx.saved_tensors
        grad, grad_inverse = grad_outputs
        grad_v, grad_v_inverse = grad @ v, grad_inverse @ v
        grad_u = start.mT @ (grad_v * sigma + grad_v_inverse / sigma)
        rotations = torch.stack([grad_u, (grad.mT @ u) * sigma + (grad_inverse.mT @ u) / sigma], dim=1).flatten(0, 1)
        skew = inverse.mT @ rotations @ inverse.mT
        free = (2 * (skew.mT - skew)).flatten(1).index_select(1, upper)
        grad_sigma = (u * grad_v).sum(dim=1) * sigma[:, 0] - (u * grad_v_inverse).sum(dim=1) / sigma[:, 0]
        return free, grad_sigma, None, None


def cayley(free: Tensor, order: int) -> Tensor:
    """Map free entries to orthogonal matrices [..., n, n] of determinant 1, (I - A)(I + A)⁻¹.

    The entries [..., n(n - 1)/2] are those of the skew-symmetric A above its diagonal, row by row.
    """
    return _cayley(free, _upper(order, free.device), order)[0]


def _cayley(free: Tensor, upper: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """Return 2 M - I and M = (I + A)⁻¹; I + A is invertible for every skew-symmetric A."""
    skew = free.new_zeros(*free.shape[:-1], order * order).index_add(-1, upper, free)
    skew = skew.view(*free.shape[:-1], order, order)
    eye = torch.eye(order, dtype=free.dtype, device=free.device)
    inverse: Tensor = torch.linalg.inv_ex(eye + (skew - skew.mT)).inverse
    return 2 * inverse - eye, inverse


def _upper(order: int, device: torch.device) -> Tensor:
    """Places above the diagonal of a flattened [n, n], row by row."""
    rows, columns = torch.triu_indices(order, order, offset=1, device=device).unbind(0)
    return rows * order + columns
