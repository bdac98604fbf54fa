"""NVIDIA architectures that the Triton kernels are compiled for, and which of them a GPU takes its tiles from.

An architecture is 10 · major + minor of the compute capability. Every op has a `tiles` module with one table by
architecture; `benchmarks/triton_aot.py` compiles what they list, without a GPU.
"""

from typing import Any

Tile = dict[str, Any]
"""Of a kernel: sizes by the names of its compile-time constants, and the options `num_warps` and `num_stages` (loads in
flight) of its launch."""

SHARED_BYTES: dict[int, int] = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    103: 227 * 1024,
    120: 99 * 1024,
}
"""Shared memory that one program may have, by architecture."""


def nearest_architecture(capability: tuple[int, int]) -> int | None:
    """Return the listed architecture whose tiles fit a GPU of a compute capability; None if none is known to.

    A GPU that is not listed takes the tiles of its generation (the same major number, hence the same kinds of
    tensor-core instructions) with the least shared memory: 8.7 those of 8.6, 12.1 those of 12.0. Another generation,
    such as 11.0, has none.
    """
    major, minor = capability
    if 10 * major + minor in SHARED_BYTES:
        return 10 * major + minor
    family = [architecture for architecture in SHARED_BYTES if architecture // 10 == major]
    return min(family, key=lambda architecture: SHARED_BYTES[architecture], default=None)
