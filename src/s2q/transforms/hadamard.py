"""Fixed rotations: Hadamard matrices of every order that a construction here reaches, and orthogonal ones of any order.

A Hadamard matrix H has entries ±1 and H Hᵀ = n I; H / √n spreads an outlier channel evenly over all channels. Orders:
1, 2, and multiples of 4 built from
- Sylvester's doubling H₂ ⊗ H and, more generally, any product of orders that can be built;
- Paley's first construction, order q + 1 for a prime q ≡ 3 mod 4 (4, 8, 12, 20, 24, 32, 44, 48, 60, …);
- Paley's second construction, order 2(q + 1) for a prime q ≡ 1 mod 4 (12, 28, 36, 60, 76, …).

1920 = 40 · 48, 3072 = 48 · 64, 8960 = 80 · 112, 12288 = 96 · 128 and 13824 = 96 · 144 are products of two such orders.
An order without a Hadamard matrix (odd, or 2 mod 4, or out of reach) is n = h · r with the largest h that has one, and
takes H_h ⊗ C_r with the orthonormal DCT-II C_r: orthogonal still, its entries at most √(2 / n) in magnitude where those
of a Hadamard matrix are √(1 / n).

Shapes: `I` features, `n1`·`n2` = I.
"""

import math
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from s2q.common.errors import InvalidInputError
from s2q.transforms.base import Factors, FixedTransform


def hadamard_matrix(order: int) -> Tensor | None:
    """Build a Hadamard matrix, fp64 [n, n] of ±1 with H Hᵀ = n I; None if no construction here has this order."""
    construct = _construction(order)
    return None if construct is None else construct()


def orthogonal_matrix(order: int) -> Tensor:
    """Build a fixed orthogonal matrix, fp64 [n, n], with entries of even magnitude: Hadamard, or Hadamard ⊗ DCT."""
    for divisor in reversed(_divisors(order)):
        matrix = hadamard_matrix(divisor)
        if matrix is not None:
            return torch.kron(matrix / math.sqrt(divisor), _dct(order // divisor))
    raise InvalidInputError(f"orthogonal matrix: got order {order}; expected at least 1")


def best_factors(features: int) -> tuple[int, int]:
    """Return n1 ≤ n2 with n1 · n2 = features and n1 as large as possible: 1920 gives (40, 48)."""
    n1 = max(divisor for divisor in _divisors(features) if divisor * divisor <= features)
    return n1, features // n1


def block_order(features: int, block_size: int) -> int:
    """Return n2, the largest divisor of the features up to a block size: 7680 and 128 give 128."""
    return max(divisor for divisor in _divisors(features) if divisor <= block_size)


def hadamard(in_features: int, *, seed: int = 0, block_size: int | None = None) -> FixedTransform:
    """Build a fixed Hadamard rotation with random signs, T = diag(±1) · (Q₁ ⊗ Q₂), exactly orthogonal.

    Where I has two factors that both have a Hadamard matrix, the most even such pair is taken and Q₁ ⊗ Q₂ is a Hadamard
    matrix; else Q₁ and Q₂ are `orthogonal_matrix` of `best_factors`. With a block size Q₁ is the identity and Q₂ has
    `block_order`.
    """
    signs = random_signs(in_features, seed)
    if block_size is not None:
        return FixedTransform(
            in_features, Factors(scale=signs, right=orthogonal_matrix(block_order(in_features, block_size)))
        )
    n1, n2 = _hadamard_factors(in_features)
    return FixedTransform(in_features, Factors(scale=signs, left=orthogonal_matrix(n1), right=orthogonal_matrix(n2)))


def random_signs(count: int, seed: int) -> Tensor:
    """Draw fp64 [count] of ±1, a function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (count,), generator=generator).double() * 2 - 1


def _hadamard_factors(features: int) -> tuple[int, int]:
    for n1 in reversed(_divisors(features)):
        if n1 * n1 <= features and _construction(n1) and _construction(features // n1):
            return n1, features // n1
    return best_factors(features)


@cache
def _construction(order: int) -> Callable[[], Tensor] | None:
    """Find how to build a Hadamard matrix of an order, without building it; None if nothing here does."""
    if order in (1, 2):
        return partial(_smallest, order)
    if order < 1 or order % 4 != 0:
        return None
    if order & (order - 1) == 0:
        return partial(_product, 2, order // 2)
    if _is_prime(order - 1):
        return partial(_paley_one, order - 1)
    if order // 2 % 4 == 2 and _is_prime(order // 2 - 1):
        return partial(_paley_two, order // 2 - 1)
    for n1 in _divisors(order):
        if 1 < n1 <= order // n1 and _construction(n1) and _construction(order // n1):
            return partial(_product, n1, order // n1)
    return None


def _smallest(order: int) -> Tensor:
    return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:order, :order]


def _product(n1: int, n2: int) -> Tensor:
    left, right = hadamard_matrix(n1), hadamard_matrix(n2)
    assert left is not None, n1
    assert right is not None, n2
    return torch.kron(left, right)


def _paley_one(q: int) -> Tensor:
    """Order q + 1, q ≡ 3 mod 4: I + S with S skew."""
    skew = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = _jacobsthal(q)
    return torch.eye(q + 1, dtype=torch.float64) + skew


def _paley_two(q: int) -> Tensor:
    """Order 2(q + 1), q ≡ 1 mod 4: from the symmetric conference matrix C of order q + 1."""
    conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    conference[0, 1:], conference[1:, 0] = 1, 1
    conference[1:, 1:] = _jacobsthal(q)
    for_ones = _smallest(2)
    for_zeros = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, for_ones) + torch.kron(torch.eye(q + 1, dtype=torch.float64), for_zeros)


def _jacobsthal(q: int) -> Tensor:
    """[q, q] with entry (i, j) = χ(i - j): 1 for a non-zero square mod q, -1 for a non-square, 0 on the diagonal."""
    chi = torch.full((q,), -1.0, dtype=torch.float64)
    chi[torch.arange(1, q) ** 2 % q] = 1
    chi[0] = 0
    index = torch.arange(q)
    return chi[(index[:, None] - index[None, :]) % q]


def _dct(order: int) -> Tensor:
    """Orthonormal DCT-II, [order, order]."""
    index = torch.arange(order, dtype=torch.float64)
    matrix = torch.cos(math.pi / order * (index[None, :] + 0.5) * index[:, None]) * math.sqrt(2 / order)
    matrix[0] /= math.sqrt(2)
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
