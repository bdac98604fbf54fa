"""Helpers of the kernels over the scores of attention; imports triton, so only modules named `triton` import it.

A kernel takes a mask as a pointer, its four strides and two constants (`expand_mask`), and loops over tiles of keys or
queries up to a length (`loop_lengths`).

Shapes: `B` samples, `H` heads, `N` queries, `M` keys, `D` head dim.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2q.ops.attention_inputs import LOG2_E
from s2q.ops.triton_math import INTERPRETING

NO_MASK, BOOLEAN_MASK, ADDITIVE_MASK = 0, 1, 2

_BOOLEAN, _ADDITIVE, _LOG2_E = tl.constexpr(BOOLEAN_MASK), tl.constexpr(ADDITIVE_MASK), tl.constexpr(LOG2_E)

LENGTHS = ["queries", "keys", "mb", "mh"]
"""Arguments that follow the number of tokens: the kernels are not compiled again for another one."""


class MaskArguments(NamedTuple):
    """A mask as a kernel takes it.

    Attributes:
        pointer: A view of the mask [B, H, N, M]; without a mask any tensor, which is not read.
        strides: Of the four axes, 0 of those that the mask lacks.
        kind: `NO_MASK`, `BOOLEAN_MASK` or `ADDITIVE_MASK`.
        is_pair_mask: Whether it differs from query to query.
    """

    pointer: Tensor
    strides: tuple[int, ...]
    kind: int
    is_pair_mask: bool

    def constants(self) -> dict[str, int | bool]:
        """Return what the kernel is compiled for."""
        return mask_constants(self.kind, self.is_pair_mask)


def mask_constants(kind: int, is_pair_mask: bool) -> dict[str, int | bool]:
    """Return the constants of a kernel that takes masks of a kind."""
    return {"MASK": kind, "PAIR_MASK": is_pair_mask}


def expand_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> MaskArguments:
    """Expand a mask, if there is one, to the scores of queries and keys."""
    if mask is None:
        return MaskArguments(query, (0, 0, 0, 0), NO_MASK, False)
    full = mask.expand(*query.shape[:3], key.shape[2])
    kind = BOOLEAN_MASK if mask.dtype == torch.bool else ADDITIVE_MASK
    is_pair_mask = full.stride(2) != 0
    return MaskArguments(full.view(torch.uint8) if kind == BOOLEAN_MASK else full, full.stride(), kind, is_pair_mask)


def loop_lengths(*lengths: int) -> list[Any]:
    """Return the numbers of tokens that a kernel loops over.

    Triton 3.6 interprets loops over an argument only with old versions of NumPy, loops over a constant with all.
    """
    return [tl.constexpr(length) if INTERPRETING else length for length in lengths]


@triton.jit
def load_tile(ptr, at, limit, stride, d_stride, HEAD_DIM: tl.constexpr, TILE_D: tl.constexpr):
    """Rows `at` of queries, keys or values [n, TILE_D], 0 beyond the edges."""
    d = tl.arange(0, TILE_D)
    valid = (at < limit)[:, None] & (d < HEAD_DIM)[None, :]
    return tl.load(ptr + (at.to(tl.int64) * stride)[:, None] + (d * d_stride)[None, :], mask=valid, other=0.0)


@triton.jit
def load_mask(ptr, n_start, m_start, n, m, n_stride, m_stride, queries, keys, PAIR_MASK: tl.constexpr):
    """Load a mask at n_start + n and m_start + m, which broadcast against each other; without PAIR_MASK at m only."""
    # Offsets inside a tile fit into 32 bits, which saves registers.
    ptr += tl.cast(n_start, tl.int64) * n_stride + tl.cast(m_start, tl.int64) * m_stride
    valid = m_start + m < keys
    offsets = m * m_stride
    if PAIR_MASK:
        valid = valid & (n_start + n < queries)
        offsets = offsets + n * n_stride
    return tl.load(ptr + offsets, mask=valid, other=0)


@triton.jit
def mask_logits(logits, mask, m, keys, MASK: tl.constexpr):
    """Apply a mask that broadcasts to the logits; those of keys m beyond the edge become -inf."""
    if MASK == _BOOLEAN:
        logits = tl.where(mask != 0, logits, float("-inf"))
    elif MASK == _ADDITIVE:
        logits += mask.to(tl.float32) * _LOG2_E
    return tl.where(m < keys, logits, float("-inf"))


@triton.jit
def softmax_step(logits, highest, total):
    """One step of a softmax over tiles of base-2 logits [n, m].

    Returns the weights 2^(logits - maximum so far), the factor of what earlier steps have summed, that maximum, and the
    sum of the weights so far.
    """
    raised = tl.maximum(highest, tl.max(logits, axis=1))
    pivot = tl.where(raised == float("-inf"), 0.0, raised)  # -inf - -inf is NaN
    weights = tl.exp2(logits - pivot[:, None])
    kept = tl.exp2(highest - pivot)
    return weights, kept, raised, total * kept + tl.sum(weights, axis=1)
