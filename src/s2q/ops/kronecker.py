"""Channel scale, then Kronecker product, the specification.

    y = (x ⊙ v) · (A ⊗ B)        with I = n1 · n2, A [n1, n1], B [n2, n2]

The I×I matrix is never built: with X = x reshaped to [n1, n2] (row-major), y = Aᵀ · X · B, which costs I · (n1 + n2)
products a token instead of I².

Example: v = [1, 1, 1, 2], A = [[0, 1], [1, 0]], B = [[1, 0], [0, 3]]; x = [1, 2, 3, 4] becomes [1, 2, 3, 8], then
Aᵀ · [[1, 2], [3, 8]] · B = [[3, 24], [1, 6]], so y = [3, 24, 1, 6].

Shapes: `I` features, `n1`, `n2` orders of the two factors; every leading dimension counts rows (tokens, or the output
channels of a weight).
"""

import torch
from torch import Tensor

from s2q.common.torch_state import without_autocast


@without_autocast
def scaled_kronecker(
    x: Tensor, *, scale: Tensor | None = None, left: Tensor | None = None, right: Tensor | None = None
) -> Tensor:
    """Multiply rows [..., I] by diag(scale [I]) · (left [n1, n1] ⊗ right [n2, n2]); differentiable in everything.

    None is the identity of the order that makes n1 · n2 = I: without `left`, each n2 channels in turn are a block of
    their own. The result has the dtype that x and the factors promote to: fp32 for a bf16 x and fp32 factors.
    """
    for factor in (scale, left, right):
        if factor is not None:
            x = x.to(torch.promote_types(x.dtype, factor.dtype))
    if scale is not None:
        x = x * scale
    if left is None and right is None:
        return x
    features = x.shape[-1]
    n1, n2 = factor_orders(features, left, right)
    assert n1 * n2 == features, (n1, n2, features)
    grid = x.reshape(*x.shape[:-1], n1, n2)
    if right is not None:
        grid = grid @ right.to(grid.dtype)
    if left is not None:
        grid = left.to(grid.dtype).t() @ grid
    return grid.reshape(*grid.shape[:-2], features)


def factor_orders(features: int, left: Tensor | None, right: Tensor | None) -> tuple[int, int]:
    """Return n1 and n2 of factors (None: the identity); their product is I where they fit."""
    if left is None:
        n2 = features if right is None else right.shape[0]
        return features // n2, n2
    n1 = left.shape[0]
    return n1, features // n1 if right is None else right.shape[0]
