"""The activation path on the CPU: the reference, in chunks of rows that stay in the caches.

Shapes: `M` tokens, `I` features.
"""

from typing import Any

import torch
from torch import Tensor

from s2q.ops.activation_path import reference

CHUNK_ELEMENTS = 1 << 18
"""Numbers in a chunk: in fp32 a MiB, so that one pass after another finds them in the cache."""

MIN_ROWS = 32


def activation_path(x: Tensor, **settings: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Transform and quantize the input of a linear; see `reference.activation_path`.

    Args:
        x: [M, I], floating.
        **settings: Those of the reference; a clip ratio for each token is not taken, one for all is.

    Returns:
        codes int8 [M, I], token scale fp32 [M, 1], coefficients fp32 [M, r] or None.
    """
    rows = max(MIN_ROWS, CHUNK_ELEMENTS // max(1, x.shape[1]))
    if len(x) <= rows:
        return reference.activation_path(x, **settings)
    codes, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(len(x), 1)
    basis = settings.get("low_rank_basis")
    coefficients = None if basis is None else torch.empty(len(x), basis.shape[1])
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        codes[part], scale[part], own = reference.activation_path(x[part], **settings)
        if coefficients is not None and own is not None:
            coefficients[part] = own
    return codes, scale, coefficients
