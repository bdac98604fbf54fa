"""What a linear takes on disk; a plan says it before the run, an inspection after it, in the same words."""

from dataclasses import dataclass

BF16_BYTES = 2
"""Bytes of a value in bf16, in which full precision is counted whatever it is stored in."""


@dataclass(frozen=True, kw_only=True)
class LinearStorage:
    """One linear on disk.

    Attributes:
        name: Full name in the transformer.
        shape: [O, I].
        scheme: Short name of its scheme, "w4a6"; the dtype ("bf16") if it stays as it is.
        bytes: Bytes of its tensors: codes, scales, bias, its input's transform and clip; or the weight as it was.
    """

    name: str
    shape: tuple[int, int]
    scheme: str
    bytes: int
