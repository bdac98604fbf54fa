"""Values of packed codes, the specification.

    v = l[code]        v = ⌊(l[code] · s + 64) / 128⌋        with the scales s of groups; see `core.codebook`

Example: the byte 0x21 holds the nibbles 1 and 2; with l = [0, 10, -20, …] it is v = [10, -20], and with s = 64 of both
v = [5, -10].

Shapes: `O` out features, `K` in features, `G` groups, `P` packed bytes of a row (`core.packing`).
"""

import torch
from torch import Tensor

from s2q.core.codebook import scaled_levels
from s2q.core.packing import unpack_codes

_NIBBLE_BITS, _NIBBLE_ZERO = 4, 8


def level_values(levels: Tensor, packed: Tensor, group_scale: Tensor | None = None, *, in_features: int) -> Tensor:
    """Look up the levels of packed codes.

    Args:
        levels: int8 [16], by nibble (`core.codebook.nibble_levels`), at most 127 in magnitude.
        packed: uint8 [O, P], codes of up to 4 bits.
        group_scale: s, int8 [O, G], at most 127 in magnitude; K is a multiple of G. None is none.
        in_features: K.

    Returns:
        v, int8 [O, K].

    Raises:
        InvalidInputError: If the packed codes do not have the width that K codes take.
    """
    codes = unpack_codes(packed, num_bits=_NIBBLE_BITS, in_features=in_features)
    values = levels[codes.int() + _NIBBLE_ZERO]
    if group_scale is None:
        return values
    grouped = values.reshape(*group_scale.shape, -1)
    return scaled_levels(grouped, group_scale.unsqueeze(2)).to(torch.int8).reshape(values.shape)
