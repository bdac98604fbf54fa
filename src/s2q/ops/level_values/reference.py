"""Values of packed codes, the specification.

    v = l[code]        v = ⌊(l_k[code] · s + 16) / 32⌋        with the bytes of groups, k and s; see `core.codebook`

Example: the byte 0x21 holds the nibbles 1 and 2; with l = [0, 10, -20, …] it is v = [10, -20]. With k = 0 and s = 16
of both, whose byte is 64, v = [5, -10].

Shapes: `O` out features, `K` in features, `G` groups, `P` packed bytes of a row (`core.packing`).
"""

import torch
from torch import Tensor

from s2q.core.codebook import scaled_levels, table_and_scale
from s2q.core.packing import NIBBLE_BITS, NIBBLE_ZERO, NIBBLES, unpack_codes


def level_values(levels: Tensor, packed: Tensor, group_scale: Tensor | None = None, *, in_features: int) -> Tensor:
    """Look up the levels of packed codes.

    Args:
        levels: int8 [16], by nibble (`core.codebook.nibble_levels`), at most 127 in magnitude; [64] with groups.
        packed: uint8 [O, P], codes of up to 4 bits.
        group_scale: Bytes of groups, int8 [O, G]; K is a multiple of G. None is none.
        in_features: K.

    Returns:
        v, int8 [O, K].

    Raises:
        InvalidInputError: If the packed codes do not have the width that K codes take.
    """
    codes = unpack_codes(packed, num_bits=NIBBLE_BITS, in_features=in_features)
    nibbles = codes.int() + NIBBLE_ZERO
    if group_scale is None:
        return levels[nibbles]
    table, scale = table_and_scale(group_scale.unsqueeze(2))
    grouped = nibbles.reshape(*group_scale.shape, -1) + table.int() * NIBBLES
    return scaled_levels(levels[grouped], scale).to(torch.int8).reshape(codes.shape)
