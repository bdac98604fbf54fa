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

from s2q.core.errors import InvalidInputError
from s2q.ops.attention_colsum.reference import check_shapes
from s2q.ops.attention_colsum.tiles import MAX_HEAD_DIM, ColsumTile, colsum_tile
from s2q.ops.triton_math import INTERPRETING, matrix_product

_LOG2_E = 1.4426950408889634

NO_MASK, BOOLEAN_MASK, ADDITIVE_MASK = 0, 1, 2


@torch.no_grad()
def attention_colsum(
    query: Tensor,
    key: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Sum the attention that each key receives, over all queries and heads; see `reference.attention_colsum`.

    Args:
        query: [B, H, N, D], fp32, fp16 or bf16; any strides. Halves are multiplied as they are, fp32 in three parts of
            tf32.
        key: [B, H, M, D], same dtype.
        mask: Broadcasts to [B, H, N, M]; boolean, or floating and added to the logits. Or None.
        scale: Of the logits; None is 1 / √D.
        chunk_size: Makes no difference here.

    Returns:
        fp32 [B, M].

    Raises:
        InvalidInputError: If shapes do not fit, or D is above 256.
    """
    check_shapes(query, key, mask, chunk_size)
    samples, heads, queries, head_dim = query.shape
    keys = key.shape[2]
    tile = colsum_tile(head_dim, itemsize=query.dtype.itemsize)
    if tile is None:
        raise InvalidInputError(
            f"attention_colsum: backend 'triton' got head dim {head_dim}; expected at most {MAX_HEAD_DIM}; "
            "use backend='reference'"
        )
    if 0 in (samples, heads, queries, keys):
        return torch.zeros(samples, keys, dtype=torch.float32, device=query.device)
    lse_BHN = torch.empty(samples, heads, queries, dtype=torch.float32, device=query.device)
    sums_BHM = torch.empty(samples, heads, keys, dtype=torch.float32, device=query.device)
    kind, mask_BHNM = _expand_mask(mask, (samples, heads, queries, keys))
    mask_strides = (0, 0, 0, 0) if mask_BHNM is None else mask_BHNM.stride()
    factor = (head_dim**-0.5 if scale is None else scale) * _LOG2_E
    inputs = (query, key, query if mask_BHNM is None else mask_BHNM)
    numbers = (heads, factor, *query.stride(), *key.stride(), *mask_strides)
    shape = {"QUERIES": queries, "KEYS": keys, "HEAD_DIM": head_dim, "MASK": kind}
    constants = shape | colsum_constants(tile, query.dtype)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    grid = (triton.cdiv(queries, tile.queries), samples * heads)
    log_sum_kernel[grid](*inputs, lse_BHN, *numbers, **constants, **options)
    grid = (triton.cdiv(keys, tile.keys), samples * heads)
    column_sum_kernel[grid](*inputs, lse_BHN, sums_BHM, *numbers, **constants, **options)
    return sums_BHM.sum(dim=1)


def colsum_constants(tile: ColsumTile, dtype: torch.dtype) -> dict[str, int | bool | str]:
    """Return the compile-time constants of both kernels that tile and dtype decide.

    Args:
        tile: See `tiles.colsum_tile`.
        dtype: Of queries and keys.
    """
    return {
        "TILE_N": tile.queries,
        "TILE_M": tile.keys,
        "TILE_D": tile.head_dim,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "native",
        "INTERPRET": INTERPRETING,
    }


def _expand_mask(mask: Tensor | None, shape: tuple[int, int, int, int]) -> tuple[int, Tensor | None]:
    """Return the kind of a mask and a view of it with all four axes, those that it lacks with stride 0."""
    if mask is None:
        return NO_MASK, None
    full = mask.expand(shape)
    return (BOOLEAN_MASK, full.view(torch.uint8)) if mask.dtype == torch.bool else (ADDITIVE_MASK, full)


@triton.jit
def _load_tile(ptr, at, stride, d_stride, LIMIT: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_D: tl.constexpr):
    """Rows `at` of queries or keys [n, TILE_D], 0 beyond the edges."""
    d = tl.arange(0, TILE_D)
    valid = (at < LIMIT)[:, None] & (d < HEAD_DIM)[None, :]
    return tl.load(ptr + (at.to(tl.int64) * stride)[:, None] + (d * d_stride)[None, :], mask=valid, other=0.0)


@triton.jit
def _mask_logits(
    logits, mask_ptr, n, m, n_stride, m_stride, MASK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr
):
    """Apply a mask to logits, [queries, keys] or transposed as the indices n and m are; keys beyond the edge go."""
    if MASK != 0:
        valid = (n < QUERIES) & (m < KEYS)
        mask = tl.load(mask_ptr + n.to(tl.int64) * n_stride + m.to(tl.int64) * m_stride, mask=valid, other=0)
        if MASK == 1:
            logits = tl.where(mask != 0, logits, float("-inf"))
        else:
            logits += mask.to(tl.float32) * 1.4426950408889634
    return tl.where(m < KEYS, logits, float("-inf"))


@triton.jit
def log_sum_kernel(
    query_ptr,
    key_ptr,
    mask_ptr,
    lse_ptr,
    heads,
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
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MASK: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_D: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """First pass: the base-2 log-sum-exp of a tile of queries of one head."""
    pair = tl.program_id(1).to(tl.int64)
    sample, head = pair // heads, pair % heads
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    query = _load_tile(query_ptr + sample * qb + head * qh, n, qn, qd, QUERIES, HEAD_DIM, TILE_D)
    key_ptr += sample * kb + head * kh
    mask_ptr += sample * mb + head * mh
    highest = tl.full((TILE_N,), float("-inf"), tl.float32)
    total = tl.zeros((TILE_N,), tl.float32)
    for start in range(0, KEYS, TILE_M):
        m = start + tl.arange(0, TILE_M)
        key = _load_tile(key_ptr, m, km, kd, KEYS, HEAD_DIM, TILE_D)
        logits = matrix_product(query, tl.trans(key), PRECISION, INTERPRET) * factor
        logits = _mask_logits(logits, mask_ptr, n[:, None], m[None, :], mn, mm, MASK, QUERIES, KEYS)
        raised = tl.maximum(highest, tl.max(logits, axis=1))
        pivot = tl.where(raised == float("-inf"), 0.0, raised)  # -inf - -inf is NaN
        total = total * tl.exp2(highest - pivot) + tl.sum(tl.exp2(logits - pivot[:, None]), axis=1)
        highest = raised
    lse = tl.where(total == 0.0, float("inf"), highest + tl.log2(total))
    tl.store(lse_ptr + pair * QUERIES + n, lse, mask=n < QUERIES)


@triton.jit
def column_sum_kernel(
    query_ptr,
    key_ptr,
    mask_ptr,
    lse_ptr,
    sums_ptr,
    heads,
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
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MASK: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_D: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Second pass: what a tile of keys of one head receives from all queries."""
    pair = tl.program_id(1).to(tl.int64)
    sample, head = pair // heads, pair % heads
    m = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    key = _load_tile(key_ptr + sample * kb + head * kh, m, km, kd, KEYS, HEAD_DIM, TILE_D)
    query_ptr += sample * qb + head * qh
    mask_ptr += sample * mb + head * mh
    sums = tl.zeros((TILE_M,), tl.float32)
    for start in range(0, QUERIES, TILE_N):
        n = start + tl.arange(0, TILE_N)
        query = _load_tile(query_ptr, n, qn, qd, QUERIES, HEAD_DIM, TILE_D)
        lse = tl.load(lse_ptr + pair * QUERIES + n, mask=n < QUERIES, other=float("inf"))
        logits = matrix_product(key, tl.trans(query), PRECISION, INTERPRET) * factor
        logits = _mask_logits(logits, mask_ptr, n[None, :], m[:, None], mn, mm, MASK, QUERIES, KEYS)
        sums += tl.sum(tl.exp2(logits - lse[None, :]), axis=1)
    tl.store(sums_ptr + pair * KEYS + m, sums, mask=m < KEYS)
