"""ConvRot: a fixed rotation in blocks of regular Hadamard matrices, as ComfyUI and SDNQ rotate.

    x → x · (1 ⊗ H),    W → W · (1 ⊗ H)ᵀ,    H = (H₄ ⊗ … ⊗ H₄) / 2^k of order 4^k,    H₄ = 1 1ᵀ - 2 P

P is the exchange matrix. Every row of H₄ has one -1, so all rows of H have the same sum: unlike Sylvester's matrix it
has no row of ones, into which a channel mean would gather. H is symmetric, H H = 1, and its entries ±2^-k are exact in
every floating dtype.

The order is the largest power of 4, up to 256, that divides the width: 64 for 1920. SDNQ's own quantizer takes powers
of 2 (128 for 1920), whose entries are not exact in bfloat16, as a checkpoint stores them; its readers take either.

Example: x = [1, 0, 0, 0] becomes [0.5, 0.5, 0.5, -0.5].

Shapes: `I` features.
"""

import torch
from torch import Tensor

from s2q.common.errors import InvalidInputError
from s2q.transforms.base import Factors, FixedTransform

_BASE = 4
ORDERS = (4, 16, 64, 256)
"""Channels of a block."""


def regular_hadamard(order: int) -> Tensor:
    """Build H of a power of 4, fp64 [n, n], orthonormal and symmetric."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    factor = torch.ones(_BASE, _BASE, dtype=torch.float64) - 2 * torch.eye(_BASE, dtype=torch.float64).flip(1)
    while matrix.shape[0] < order:
        matrix = torch.kron(matrix, factor / 2)
    assert matrix.shape[0] == order, order
    return matrix


def convrot_order(features: int, *, block_size: int | None = None) -> int:
    """Return the largest of `ORDERS`, or of those up to a block size, that divides the features.

    Raises:
        InvalidInputError: If none does.
    """
    orders = [order for order in ORDERS if features % order == 0 and (block_size is None or order <= block_size)]
    if not orders:
        given = "" if block_size is None else f" and block_size={block_size}"
        raise InvalidInputError(
            f"convrot: in_features={features}{given}; expected a multiple of {ORDERS[0]}; use rotation=hadamard, "
            "or add the linear to skip"
        )
    return orders[-1]


def convrot(in_features: int, *, seed: int = 0, block_size: int | None = None) -> FixedTransform:
    """Build the rotation; the seed changes nothing, since there are no signs to draw."""
    order = convrot_order(in_features, block_size=block_size)
    return FixedTransform(in_features, Factors(right=regular_hadamard(order)))
