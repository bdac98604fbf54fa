"""The layout of packed codes, on disk and in memory.

Up to 4 bits: two codes a byte, offset binary (code + 8), the even input channel in the low nibble; an odd number of
input channels is padded with one code 0 (nibble 8). A row starts on a byte. 5 to 8 bits: one code a byte, two's
complement.

Example: codes [-8, 7, 3] -> nibbles [0, 15, 11, 8] -> bytes [0xF0, 0x8B].

Shapes: `O` out features, `I` in features, `P` packed bytes of a row.
"""

import torch
from torch import Tensor

from s2q.common.errors import InvalidInputError
from s2q.core.schemes import MAX_BITS, MIN_BITS, QuantScheme, num_groups
from s2q.core.stored_form import file_dtypes

NIBBLE_BITS, NIBBLES = 4, 16
NIBBLE_ZERO = 8
"""The nibble of code 0."""


def packed_width(num_bits: int, in_features: int) -> int:
    """Return P, the bytes of a packed row: ⌈I / 2⌉ up to 4 bits, I above; InvalidInputError if N is not 2 to 8."""
    if not MIN_BITS <= num_bits <= MAX_BITS:
        raise InvalidInputError(f"num_bits={num_bits}; expected a whole number from {MIN_BITS} to {MAX_BITS}")
    return (in_features + 1) // 2 if num_bits <= 4 else in_features


def weight_bytes(scheme: QuantScheme, out_features: int, in_features: int) -> int:
    """Return the exact bytes of a packed weight with its bf16 scales, as stored (bias not counted).

    Example: 4 bits per channel, O = 2, I = 5: 2·3 packed + 2·2 of scales = 10. Example, "table", 4 bits in groups of
    16, O = 2, I = 32: 2·16 packed + 2·2 of group scales + 2·2 of scales = 40.
    """
    groups, dtypes = num_groups(scheme, in_features), file_dtypes()
    scales = dtypes["weight_scale"].itemsize * (1 if scheme.has_table else groups)
    if scheme.has_table:
        scales += dtypes["weight_group_scale"].itemsize * groups
    return out_features * (packed_width(scheme.num_bits, in_features) + scales)


def pack_codes(codes: Tensor, *, num_bits: int) -> Tensor:
    """Pack the codes of a weight, int8 [O, I], each in [-2^(N-1), 2^(N-1) - 1], into contiguous new uint8 [O, P].

    Raises:
        InvalidInputError: If codes is not an int8 matrix or holds a code that num_bits cannot.
    """
    width = packed_width(num_bits, codes.shape[-1])
    if codes.dtype != torch.int8 or codes.ndim != 2:
        raise InvalidInputError(f"codes: got {codes.dtype} {list(codes.shape)}; expected int8 [out, in]")
    limit = 1 << (num_bits - 1)
    if not codes.is_meta and codes.numel():
        low, high = (int(bound) for bound in torch.aminmax(codes))
        if low < -limit or high >= limit:
            raise InvalidInputError(f"codes: found {low}..{high}; {num_bits} bits represent {-limit}..{limit - 1}")
    if num_bits > 4:
        return codes.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    nibbles = codes.new_full((codes.shape[0], 2 * width), NIBBLE_ZERO)
    nibbles[:, : codes.shape[1]] += codes
    unsigned = nibbles.view(torch.uint8)
    return unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)


def check_packed(packed: Tensor, *, num_bits: int, in_features: int) -> None:
    """Raise InvalidInputError if packed is not a uint8 matrix of the width that I codes of N bits take."""
    width = packed_width(num_bits, in_features)
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != width:
        raise InvalidInputError(
            f"packed codes: got {packed.dtype} {list(packed.shape)}; expected uint8 [out, {width}] for {in_features} "
            f"codes of {num_bits} bits; the data is damaged or belongs to another scheme"
        )


def unpack_codes(packed: Tensor, *, num_bits: int, in_features: int, out: Tensor | None = None) -> Tensor:
    """Undo `pack_codes`: uint8 [O, P] becomes int8 [O, I], in `out`, int8 [O, 2P], if there is one.

    Up to 4 bits and odd I: a view with row stride I + 1. Above 4 bits: shares memory with packed.

    Raises:
        InvalidInputError: If packed is not a uint8 matrix of the width that I codes of N bits take.
    """
    check_packed(packed, num_bits=num_bits, in_features=in_features)
    if num_bits > 4:
        return packed.view(torch.int8)
    # Spread each byte over the two bytes of an int16 (the low nibble first, as memory is little-endian).
    wide = packed.contiguous().to(torch.int16) if out is None else out.view(torch.int16).copy_(packed)
    wide.bitwise_or_(wide << 4).bitwise_and_(0x0F0F)
    codes: Tensor = wide.view(torch.int8).sub_(NIBBLE_ZERO)
    return codes[:, :in_features]
