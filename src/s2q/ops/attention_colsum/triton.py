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
from s2q.ops.attention_colsum.tiles import MIN_DEPTH, TILES
from s2q.ops.attention_inputs import LOG2_E, check_shapes, find_tile, score_scale
from s2q.ops.dispatch import architecture_of, launch
from s2q.ops.triton_attention import (
    LENGTHS,
    expand_mask,
    load_mask,
    load_tile,
    loop_lengths,
    mask_logits,
    softmax_step,
)
from s2q.ops.triton_math import INTERPRETING, matrix_product


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
    check_shapes(query, key, mask, op="attention_colsum")
    reference.check_chunk(chunk_size)
    samples, heads, queries, head_dim = query.shape
    keys, masking = key.shape[2], expand_mask(mask, query, key)
    tile = find_tile(
        TILES[architecture_of(query)],
        head_dim,
        min_depth=MIN_DEPTH,
        itemsize=query.dtype.itemsize,
        has_pair_mask=masking.is_pair_mask,
    )
    if 0 in (samples, heads, queries, keys):
        return torch.zeros(samples, keys, dtype=torch.float32, device=query.device)
    lse_BHN = torch.empty(samples, heads, queries, dtype=torch.float32, device=query.device)
    sums_BHM = torch.empty(samples, heads, keys, dtype=torch.float32, device=query.device)
    inputs, factor = (query, key, masking.pointer), score_scale(query, scale) * LOG2_E
    strides = (*query.stride(), *key.stride(), *masking.strides)
    numbers = (heads, *loop_lengths(queries, keys), factor, *strides)
    settings = tile | masking.constants() | {"HEAD_DIM": head_dim, "INTERPRET": INTERPRETING}
    grid = (triton.cdiv(queries, tile["TILE_N"]), samples * heads)
    launch(log_sum_kernel, grid, *inputs, lse_BHN, *numbers, **settings)
    grid = (triton.cdiv(keys, tile["TILE_M"]), samples * heads)
    launch(column_sum_kernel, grid, *inputs, lse_BHN, sums_BHM, *numbers, **settings)
    return sums_BHM.sum(dim=1)


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
        _, _, highest, total = softmax_step(logits, highest, total)
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
