"""Column sums of attention in two passes over tiles of logits, which never leave the chip.

    first, per query i:  l_i = log2 Σ_j 2^(s_ij)            second, per key j:  S_j = Σ_h Σ_i 2^(s_ij - l_i)

with s = (q · k · scale + mask) · log2(e). The first keeps a running maximum and sum of each query over the tiles of its
keys, the second runs over the queries for a tile of keys, so that nothing is added atomically and the result is the
same each time. A query whose keys are all masked has l = +inf and adds 0; a NaN among the logits of a query reaches
all keys.

Shapes: `B` samples, `H` heads, `N` queries, `M` keys, `D` head dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2q.ops.attention_colsum import reference
from s2q.ops.attention_colsum.tiles import colsum_tile
from s2q.ops.dispatch import KernelUnavailableError, architecture_of, launch
from s2q.ops.triton_math import INTERPRETING, matrix_product

_LOG2_E = 1.4426950408889634

NO_MASK, BOOLEAN_MASK, ADDITIVE_MASK = 0, 1, 2

LENGTHS = ["queries", "keys", "mb", "mh"]
"""Arguments that follow the number of tokens: the kernels are not compiled again for another one."""


@torch.no_grad()
def attention_colsum(
    query: Tensor, key: Tensor, *, mask: Tensor | None = None, scale: float | None = None, chunk_size: int | None = None
) -> Tensor:
    """Sum the attention that each key receives, over all queries and heads; see `reference.attention_colsum`.

    Queries and keys are fp32, fp16 or bf16 with any strides. Halves are multiplied directly, fp32 as three products of
    tf32 parts, or as one product of tf32 where D is above 64. The chunk size makes no difference.

    Raises:
        InvalidInputError: If shapes do not fit or the chunk size is not positive.
        KernelUnavailableError: If D is above 256.
    """
    reference.check_shapes(query, key, mask, op="attention_colsum")
    reference.check_chunk(chunk_size)
    samples, heads, queries, head_dim = query.shape
    keys = key.shape[2]
    kind, mask_BHNM = expand_mask(mask, (samples, heads, queries, keys))
    is_pair_mask = mask_BHNM is not None and mask_BHNM.stride(2) != 0
    itemsize, architecture = query.dtype.itemsize, architecture_of(query)
    tile = colsum_tile(head_dim, itemsize=itemsize, has_pair_mask=is_pair_mask, architecture=architecture)
    if tile is None:
        raise KernelUnavailableError(f"got heads of {head_dim} features; no tile is that wide")
    if 0 in (samples, heads, queries, keys):
        return torch.zeros(samples, keys, dtype=torch.float32, device=query.device)
    lse_BHN = torch.empty(samples, heads, queries, dtype=torch.float32, device=query.device)
    sums_BHM = torch.empty(samples, heads, keys, dtype=torch.float32, device=query.device)
    mask_strides = (0, 0, 0, 0) if mask_BHNM is None else mask_BHNM.stride()
    factor = (head_dim**-0.5 if scale is None else scale) * _LOG2_E
    inputs = (query, key, query if mask_BHNM is None else mask_BHNM)
    # Triton 3.6 interprets loops over an argument only with old versions of NumPy, loops over a constant with all.
    lengths = [tl.constexpr(length) if INTERPRETING else length for length in (queries, keys)]
    numbers = (heads, *lengths, factor, *query.stride(), *key.stride(), *mask_strides)
    settings = tile | {"HEAD_DIM": head_dim, "MASK": kind, "PAIR_MASK": is_pair_mask, "INTERPRET": INTERPRETING}
    grid = (triton.cdiv(queries, tile["TILE_N"]), samples * heads)
    launch(log_sum_kernel, grid, *inputs, lse_BHN, *numbers, **settings)
    grid = (triton.cdiv(keys, tile["TILE_M"]), samples * heads)
    launch(column_sum_kernel, grid, *inputs, lse_BHN, sums_BHM, *numbers, **settings)
    return sums_BHM.sum(dim=1)


def expand_mask(mask: Tensor | None, shape: tuple[int, int, int, int]) -> tuple[int, Tensor | None]:
    """Return the kind of a mask and a view of it with all four axes, those that it lacks with stride 0."""
    if mask is None:
        return NO_MASK, None
    full = mask.expand(shape)
    return (BOOLEAN_MASK, full.view(torch.uint8)) if mask.dtype == torch.bool else (ADDITIVE_MASK, full)


@triton.jit
def load_tile(ptr, at, limit, stride, d_stride, HEAD_DIM: tl.constexpr, TILE_D: tl.constexpr):
    """Rows `at` of queries or keys [n, TILE_D], 0 beyond the edges."""
    d = tl.arange(0, TILE_D)
    valid = (at < limit)[:, None] & (d < HEAD_DIM)[None, :]
    return tl.load(ptr + (at.to(tl.int64) * stride)[:, None] + (d * d_stride)[None, :], mask=valid, other=0.0)


@triton.jit
def mask_logits(logits, mask, m, keys, MASK: tl.constexpr):
    """Apply a mask that broadcasts to the logits; those of keys m beyond the edge become -inf."""
    if MASK == 1:
        logits = tl.where(mask != 0, logits, float("-inf"))
    elif MASK == 2:
        logits += mask.to(tl.float32) * 1.4426950408889634
    return tl.where(m < keys, logits, float("-inf"))


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


@triton.jit(do_not_specialize=LENGTHS)
def log_sum_kernel(
    query_ptr,
    key_ptr,
    mask_ptr,
    lse_ptr,
    heads,
    queries,
    keys,
    factor,
    qb,
    qh,
    qn,
    qd,
    kb,
    kh,
    km,
    kd,
    mb,
    mh,
    mn,
    mm,
    HEAD_DIM: tl.constexpr,
    MASK: tl.constexpr,
    PAIR_MASK: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_D: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """First pass: the base-2 log-sum-exp of a tile of queries of one head."""
    pair = tl.program_id(1).to(tl.int64)
    sample, head = pair // heads, pair % heads
    n_start, n_tile, m_tile = tl.program_id(0) * TILE_N, tl.arange(0, TILE_N), tl.arange(0, TILE_M)
    n = n_start + n_tile
    query = load_tile(query_ptr + sample * qb + head * qh, n, queries, qn, qd, HEAD_DIM, TILE_D)
    key_ptr += sample * kb + head * kh
    mask_ptr += sample * mb + head * mh
    highest = tl.full((TILE_N,), float("-inf"), tl.float32)
    total = tl.zeros((TILE_N,), tl.float32)
    for start in range(0, keys, TILE_M):
        m = start + m_tile
        key = load_tile(key_ptr, m, keys, km, kd, HEAD_DIM, TILE_D)
        logits = matrix_product(query, tl.trans(key), PRECISION, INTERPRET) * factor
        mask = 0
        if MASK != 0:
            mask = load_mask(
                mask_ptr, n_start, start, n_tile[:, None], m_tile[None, :], mn, mm, queries, keys, PAIR_MASK
            )
        logits = mask_logits(logits, mask, m[None, :], keys, MASK)
        raised = tl.maximum(highest, tl.max(logits, axis=1))
        pivot = tl.where(raised == float("-inf"), 0.0, raised)  # -inf - -inf is NaN
        total = total * tl.exp2(highest - pivot) + tl.sum(tl.exp2(logits - pivot[:, None]), axis=1)
        highest = raised
    lse = tl.where(total == 0.0, float("inf"), highest + tl.log2(total))
    tl.store(lse_ptr + pair * queries + n, lse, mask=n < queries)


@triton.jit(do_not_specialize=LENGTHS)
def column_sum_kernel(
    query_ptr,
    key_ptr,
    mask_ptr,
    lse_ptr,
    sums_ptr,
    heads,
    queries,
    keys,
    factor,
    qb,
    qh,
    qn,
    qd,
    kb,
    kh,
    km,
    kd,
    mb,
    mh,
    mn,
    mm,
    HEAD_DIM: tl.constexpr,
    MASK: tl.constexpr,
    PAIR_MASK: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_D: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Second pass: what a tile of keys of one head receives from all queries."""
    pair = tl.program_id(1).to(tl.int64)
    sample, head = pair // heads, pair % heads
    m_start, n_tile, m_tile = tl.program_id(0) * TILE_M, tl.arange(0, TILE_N), tl.arange(0, TILE_M)
    m = m_start + m_tile
    key = load_tile(key_ptr + sample * kb + head * kh, m, keys, km, kd, HEAD_DIM, TILE_D)
    query_ptr += sample * qb + head * qh
    mask_ptr += sample * mb + head * mh
    sums = tl.zeros((TILE_M,), tl.float32)
    for start in range(0, queries, TILE_N):
        n = start + n_tile
        query = load_tile(query_ptr, n, queries, qn, qd, HEAD_DIM, TILE_D)
        lse = tl.load(lse_ptr + pair * queries + n, mask=n < queries, other=float("inf"))
        logits = matrix_product(key, tl.trans(query), PRECISION, INTERPRET) * factor
        mask = 0
        if MASK != 0:
            mask = load_mask(
                mask_ptr, start, m_start, n_tile[None, :], m_tile[:, None], mn, mm, queries, keys, PAIR_MASK
            )
        logits = mask_logits(logits, mask, m[:, None], keys, MASK)
        # A share is at most 1, but the two passes add in different orders: huge logits may differ by more than 0.
        share = tl.minimum(logits - lse[None, :], 0.0, propagate_nan=tl.PropagateNan.ALL)
        sums += tl.sum(tl.exp2(share), axis=1)
    tl.store(sums_ptr + pair * keys + m, sums, mask=m < keys)
