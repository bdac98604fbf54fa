"""The directions that a low-rank branch takes out of an input, or of a weight, to be multiplied in floating point.

    u = x diag(v),    y = u Wᵀ = (u - u V Vᵀ) Wᵀ + (u V) (W V)ᵀ        from the input
                            y = u (W - L Vᵀ)ᵀ + (u V) Lᵀ                 from the weight, L = W V

hold for every V [I, r]. A quantizer's error goes with the size of what it quantizes. With V the directions of largest
second moment, what is left of the input is as small as rank r allows (ResQ, Saxena et al., 2024, keeps such a subspace
in high precision); with V the top right singular vectors of W, what is left of the weight is (SVDQuant, Li et al.,
2024). With orthonormal V both may be left out at once, (u - u V Vᵀ) (W - W V Vᵀ)ᵀ = (u - u V Vᵀ) Wᵀ: the error of
each side then meets the smaller other side.

Example: rows [3, 1] and [3, -1] have the second moments [[9, 0], [0, 1]]; the first direction is [1, 0], and [0, 1] and
[0, -1] are left.

Shapes: `I/O` in/out features, `r` rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from s2q.common.errors import InvalidInputError


def principal_directions(second_moment: Tensor, rank: int) -> Tensor:
    """Return the r directions along which an input is largest, orthonormal fp64 [I, r], from E[xᵀ x], symmetric [I, I].

    They are in falling order; the largest entry of each is positive.

    Raises:
        InvalidInputError: If the matrix is not square, contains NaN or infinite values, or the rank is out of range.
    """
    features = second_moment.shape[0]
    if second_moment.shape != (features, features):
        raise InvalidInputError(f"low rank: got second moments of shape {list(second_moment.shape)}; expected [I, I]")
    if not 1 <= rank <= features:
        raise InvalidInputError(f"low rank: rank={rank}; expected 1 to {features}")
    if not bool(second_moment.isfinite().all()):
        raise InvalidInputError(
            "low rank: second moments contain NaN or infinite values; check the model's activations"
        )
    directions = torch.linalg.eigh(second_moment.double()).eigenvectors[:, -rank:].flip(1)
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    signed: Tensor = directions * largest.sign()
    return signed


def weight_directions(weights: Sequence[Tensor], rank: int) -> Tensor:
    """Return the top right singular vectors of weights [O, I] that read the same input, stacked.

    Like `principal_directions`: fp64 [I, r], in falling order, the largest entry of each positive.
    """
    stacked = torch.cat([weight.double() for weight in weights])
    return principal_directions(stacked.t() @ stacked, rank)
