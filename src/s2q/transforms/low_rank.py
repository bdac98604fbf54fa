"""The directions of an input that a low-rank branch takes out, to be multiplied in floating point.

    u = x diag(v),    y = u Wᵀ = (u - u V Vᵀ) Wᵀ + (u V) (W V)ᵀ

holds for every V [I, r]. With V the directions of largest second moment, what is left to quantize is as small as rank r
allows, and a quantizer's error goes with the size of what it quantizes. SVDQuant (Li et al., 2024) takes the branch
from the weight; this takes it from the input, as ResQ (Saxena et al., 2024) does its high-precision subspace.

Example: rows [3, 1] and [3, -1] have the second moments [[9, 0], [0, 1]]; the first direction is [1, 0], and [0, 1] and
[0, -1] are left.

Shapes: `I/O` in/out features, `r` rank.
"""

import torch
from torch import Tensor

from s2q.core.errors import InvalidInputError


def principal_directions(second_moment: Tensor, rank: int) -> Tensor:
    """Return the directions along which an input is largest, in falling order.

    Args:
        second_moment: [I, I], E[xᵀ x], symmetric; its upper triangle is not read.
        rank: r, 1 to I.

    Returns:
        fp64 [I, r], orthonormal columns; the largest entry of each is positive.

    Raises:
        InvalidInputError: If the matrix is not square, holds NaN or infinite values, or the rank is out of range.
    """
    features = second_moment.shape[0]
    if second_moment.shape != (features, features):
        raise InvalidInputError(f"low rank: got second moments of shape {list(second_moment.shape)}; expected [I, I]")
    if not 1 <= rank <= features:
        raise InvalidInputError(f"low rank: rank={rank}; expected 1 to {features}")
    if not bool(second_moment.isfinite().all()):
        raise InvalidInputError("low rank: second moments hold NaN or infinite values; check the model's activations")
    directions = torch.linalg.eigh(second_moment.double()).eigenvectors[:, -rank:].flip(1)
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    signed: Tensor = directions * largest.sign()
    return signed
