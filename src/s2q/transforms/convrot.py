"""ConvRot: a fixed rotation in blocks of regular Hadamard matrices, as ComfyUI and SDNQ rotate.

    x → x · (1 ⊗ H),    W → W · (1 ⊗ H)ᵀ,    H = (H₄ ⊗ … ⊗ H₄) / 2^k of order 4^k,    H₄ = 1 1ᵀ - 2 P

P is the exchange matrix. Every row of H₄ has one -1, so all rows of H have the same sum: unlike Sylvester's matrix it
has no row of ones, into which a channel mean would gather. H is symmetric, H H = 1, and its entries ±2^-k are exact in
every floating dtype.

The order is the largest that divides the width: powers of 4 up to 256 for "convrot"; for "convrot_pow2", SDNQ's choice,
powers of 2 up to 256, with Sylvester's matrix where that is no power of 4 (1920: 64 in the one, 128 in the other).

Example: x = [1, 0, 0, 0] becomes [0.5, 0.5, 0.5, -0.5].

Shapes: `I` features.
"""

import math

import torch
from torch import Tensor

from s2q.common.errors import InvalidInputError
from s2q.transforms.base import Factors, FixedTransform
from s2q.transforms.hadamard import hadamard_matrix

LARGEST_ORDER, SMALLEST_ORDER = 256, 4
_BASE = 4


def regular_hadamard(order: int) -> Tensor:
    """Build H of a power of 4, fp64 [n, n], orthonormal and symmetric."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    factor = torch.ones(_BASE, _BASE, dtype=torch.float64) - 2 * torch.eye(_BASE, dtype=torch.float64).flip(1)
    while matrix.shape[0] < order:
        matrix = torch.kron(matrix, factor / 2)
    assert matrix.shape[0] == order, order
    return matrix


def convrot_order(features: int, *, base: int = _BASE, block_size: int | None = None) -> int:
    """Return the largest power of `base` up to 256, or up to a smaller block size, that divides the features.

    Raises:
        InvalidInputError: If that is below 4.
    """
    limit = min(LARGEST_ORDER, block_size or LARGEST_ORDER)
    order = 1
    while order * base <= limit and features % (order * base) == 0:
        order *= base
    if order < SMALLEST_ORDER:
        given = "" if block_size is None else f" and block_size={block_size}"
        raise InvalidInputError(
            f"convrot: in_features={features}{given}; expected a multiple of {SMALLEST_ORDER}; use rotation=hadamard, "
            "or add the linear to skip"
        )
    return order


def convrot_matrix(order: int) -> Tensor:
    """Return the matrix of an order, fp64 [n, n]: regular for powers of 4, Sylvester's for other powers of 2."""
    if order.bit_length() % 2:
        return regular_hadamard(order)
    matrix = hadamard_matrix(order)
    assert matrix is not None, order
    return matrix / math.sqrt(order)


def convrot(in_features: int, *, seed: int = 0, block_size: int | None = None) -> FixedTransform:
    """Build the rotation with orders of powers of 4; the seed changes nothing, since there are no signs to draw."""
    return _rotation(in_features, convrot_order(in_features, block_size=block_size))


def convrot_pow2(in_features: int, *, seed: int = 0, block_size: int | None = None) -> FixedTransform:
    """Build the rotation with orders of powers of 2; see `convrot`."""
    return _rotation(in_features, convrot_order(in_features, base=2, block_size=block_size))


def _rotation(in_features: int, order: int) -> FixedTransform:
    return FixedTransform(in_features, Factors(right=convrot_matrix(order)))
