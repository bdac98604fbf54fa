"""Storage of a linear, in the same form in a plan and in an inspected checkpoint."""

import re
from dataclasses import dataclass
from numbers import Integral

from s2q.common.errors import InvalidInputError, short_repr

BF16_BYTES = 2
"""Bytes of a value in bf16, in which full precision is counted whatever it is stored in."""


@dataclass(frozen=True, kw_only=True)
class LinearStorage:
    """One linear on disk.

    Attributes:
        name: Full name in the transformer; in a second one, with "transformer_2." before it.
        shape: [O, I].
        scheme: Short name of its scheme, "w4a6"; the dtype ("bf16") if it is not quantized.
        bytes: Bytes of its tensors: codes, scales, bias, its input's transform and clip; or the unquantized weight.
    """

    name: str
    shape: tuple[int, int]
    scheme: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class EncoderStorage:
    """One quantized text encoder on disk.

    Attributes:
        component: Its name in the pipeline, "text_encoder".
        class_name: Its class in transformers.
        scheme: Short name of the scheme of its quantized linears, "w8a16".
        linears: Number of these.
        full_precision_bytes: Bytes of all its values in bf16.
        quantized_bytes: Bytes of all its tensors as stored.
    """

    component: str
    class_name: str
    scheme: str
    linears: int
    full_precision_bytes: int
    quantized_bytes: int


_DECIMAL = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BINARY = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_UNITS = _DECIMAL | _BINARY


def parse_bytes(size: int | str, *, option: str) -> int:
    """Return the bytes that a size means, in either case: 16GB is 16 · 10⁹, 16GiB is 16 · 2³⁰; an int is bytes.

    InvalidInputError if it is no size, or not above zero; `option` is what it was given for.
    """
    if isinstance(size, bool) or not isinstance(size, str | Integral):
        raise InvalidInputError(f"{option}: got {short_repr(size)}; expected a size such as 16GB or 24GiB")
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([KMGT]I?B|)", str(size).strip().upper())
    num_bytes = 0 if match is None else int(float(match[1]) * _UNITS[match[2]])
    if num_bytes <= 0:
        raise InvalidInputError(f"{option}: got {short_repr(str(size))}; expected a size such as 16GB or 24GiB")
    return num_bytes
