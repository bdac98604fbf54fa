"""The directions that a low-rank branch takes out of an input, or of a weight, to be multiplied in floating point.

    u = x diag(v),    y = u Wᵀ = (u - u V Vᵀ) Wᵀ + (u V) (W V)ᵀ        from the input
                            y = u (W - L Vᵀ)ᵀ + (u V) Lᵀ                 from the weight, L = W V

hold for every V [I, r]. A quantizer's error goes with the size of what it quantizes. With V the directions of largest
second moment, what is left of the input is as small as rank r allows (ResQ, Saxena et al., 2024, keeps such a subspace
in high precision); with V the top right singular vectors of W, what is left of the weight is (SVDQuant, Li et al.,
2024). With orthonormal V both may be left out at once, (u - u V Vᵀ) (W - W V Vᵀ)ᵀ = (u - u V Vᵀ) Wᵀ: the error of
each side then meets the smaller other side.

Of a wide input only the largest directions are computed, by subspace iteration (Halko, Martinsson and Tropp, 2011,
algorithm 4.4) on twice as many, from a fixed start: I² r products each time instead of the I³ of all directions.

Example: rows [3, 1] and [3, -1] have the second moments [[9, 0], [0, 1]]; the first direction is [1, 0], and [0, 1] and
[0, -1] are left.

Shapes: `I/O` in/out features, `r` rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from s2q.common.errors import InvalidInputError

_ITERATED = 1024  # features above which directions are iterated: up to there all of them take less than a second
_MOST_ITERATIONS, _TOLERANCE = 50, 1e-7


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
    wide = second_moment.double()
    iterated = features > _ITERATED and 2 * rank < features // 2
    directions = _subspace(wide, rank) if iterated else torch.linalg.eigh(wide).eigenvectors[:, -rank:].flip(1)
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    signed: Tensor = directions * largest.sign()
    return signed


def _subspace(matrix: Tensor, rank: int) -> Tensor:
    """Directions of the largest eigenvalues of a symmetric, positive semi-definite matrix, fp64 [I, r].

    It ends once their sum, tr(Vᵀ M V), grows by less than `_TOLERANCE` of itself.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(matrix), 2 * rank, generator=generator, dtype=matrix.dtype, device="cpu")
    basis, captured = torch.linalg.qr(matrix @ start.to(matrix.device)).Q, 0.0
    for _ in range(_MOST_ITERATIONS):
        image = matrix @ basis
        values, vectors = torch.linalg.eigh(basis.t() @ image)
        before, captured = captured, float(values[-rank:].sum())
        if captured - before <= _TOLERANCE * captured:
            directions: Tensor = (basis @ vectors[:, -rank:]).flip(1)
            return directions
        basis = torch.linalg.qr(image).Q
    exact: Tensor = torch.linalg.eigh(matrix).eigenvectors[:, -rank:].flip(1)  # eigenvalues are too close to each other
    return exact


def weight_directions(weights: Sequence[Tensor], rank: int) -> Tensor:
    """Return the top right singular vectors of weights [O, I] that read the same input, stacked.

    Like `principal_directions`: fp64 [I, r], in falling order, the largest entry of each positive.
    """
    stacked = torch.cat([weight.double() for weight in weights])
    return principal_directions(stacked.t() @ stacked, rank)
