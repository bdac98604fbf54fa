"""A channel scale from weights alone: the norms of the columns that read a channel.

    T = diag(1/s),    s_j = m / ‖w_j‖,    m the mean of the norms

w_j is the column j of all weights that read the input, stacked. Folded, every column has the norm m, and a rotation
after it mixes equal shares. Where training or a fusion has made a channel large, the columns that read it are small
by as much, since neither changes the product: x_j · ‖w_j‖ is what the channel contributes, and the scale leaves no
outlier in it. Data-free quantization equalizes ranges of weights in the same way (Nagel et al., 2019).

Example: columns of norms [4, 1] give s = [0.625, 2.5]; x = [1, 4] becomes [1.6, 1.6].

Shapes: `O/I` out/in features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from s2q.common.errors import InvalidInputError

_FLOOR = 1e-5  # of the largest norm: a column that is zero gets a finite s


def column_scale(weights: Sequence[Tensor]) -> Tensor:
    """Compute s, fp64 [I], from the weights [O, I] that read an input.

    Raises:
        InvalidInputError: If a weight contains NaN or infinite values.
    """
    norms: Tensor = torch.stack(
        [torch.linalg.vector_norm(weight, dim=0, dtype=torch.float64) for weight in weights]
    ).norm(dim=0)
    if not bool(norms.isfinite().all()):
        raise InvalidInputError("column scale: the weights contain NaN or infinite values; check the model")
    largest = norms.max()
    if not bool(largest > 0):
        return torch.ones_like(norms)
    norms = norms.clamp_min(largest * _FLOOR)
    scale: Tensor = norms.mean() / norms
    return scale
