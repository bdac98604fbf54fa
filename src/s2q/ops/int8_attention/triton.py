"""Attention with int8 queries and keys in one pass over tiles of scores, which never leave the chip.

Queries and keys are quantized by a kernel of their own, a block of tokens of a head each program. The attention kernel
keeps a running maximum, sum and output of a tile of queries over the blocks of keys, as `reference` does; the last
block, which the keys may not fill, is outside the loop.

Shapes: `B` samples, `H` heads, `N` queries, `M` keys, `D` head dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2q.ops.attention_inputs import LOG2_E, find_tile, score_scale
from s2q.ops.dispatch import architecture_of, launch
from s2q.ops.int8_attention import reference
from s2q.ops.int8_attention.reference import KEY_BLOCK, QUERY_BLOCK
from s2q.ops.int8_attention.tiles import MIN_DEPTH, TILES
from s2q.ops.triton_attention import (
    LENGTHS,
    expand_mask,
    load_mask,
    load_tile,
    loop_lengths,
    mask_logits,
    softmax_step,
)
from s2q.ops.triton_math import INTERPRETING, magnitude_bits, matrix_product, quantization_scale, quantize

BLOCKS = {"QUERY_BLOCK": QUERY_BLOCK, "TILE_M": KEY_BLOCK}
"""Constants of `int8_attention_kernel`: tokens that share a scale."""

QUANTIZE_WARPS = 8


@torch.no_grad()
def int8_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """Attend with int8 queries and keys; see `reference.int8_attention`.

    Queries, keys and values are fp32, fp16 or bf16 with any strides. The product with V takes halves directly, and
    fp32 as tf32.

    Raises:
        InvalidInputError: If shapes do not fit, or D is above 128.
        KernelUnavailableError: If there is no tile for D.
    """
    reference.check_inputs(query, key, value, mask)
    samples, heads, queries, head_dim = query.shape
    keys, masking = key.shape[2], expand_mask(mask, query, key)
    tile = find_tile(
        TILES[architecture_of(query)],
        head_dim,
        min_depth=MIN_DEPTH,
        itemsize=value.dtype.itemsize,
        has_pair_mask=masking.is_pair_mask,
    )
    out = torch.empty_like(query)
    if 0 in query.shape or keys == 0:
        return out.zero_()
    query_codes, query_scale = quantize_blocks(query, None, QUERY_BLOCK, tile["TILE_D"])
    key_codes, key_scale = quantize_blocks(key, reference.token_mean(key), KEY_BLOCK, tile["TILE_D"])
    launch(
        int8_attention_kernel,
        (triton.cdiv(queries, tile["TILE_N"]), samples * heads),
        query_codes,
        key_codes,
        value,
        masking.pointer,
        query_scale,
        key_scale,
        out,
        heads,
        *loop_lengths(queries, keys),
        score_scale(query, scale) * LOG2_E,
        *value.stride(),
        *out.stride(),
        *masking.strides,
        **masking.constants(),
        **BLOCKS,
        HEAD_DIM=head_dim,
        INTERPRET=INTERPRETING,
        **tile,
    )
    return out


def quantize_blocks(x: Tensor, mean: Tensor | None, size: int, padded: int) -> tuple[Tensor, Tensor]:
    """Quantize blocks of `size` tokens of x [B, H, N, D], less a mean fp32 [B, H, 1, D]: int8 codes, fp32 scales."""
    samples, heads, tokens, head_dim = x.shape
    blocks = triton.cdiv(tokens, size)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(samples, heads, blocks, dtype=torch.float32, device=x.device)
    launch(
        quantize_block_kernel,
        (blocks, samples * heads),
        x,
        scale if mean is None else mean.contiguous(),
        codes,
        scale,
        heads,
        tokens,
        *x.stride(),
        HAS_MEAN=mean is not None,
        HEAD_DIM=head_dim,
        BLOCK=size,
        TILE_D=padded,
        num_warps=QUANTIZE_WARPS,
    )
    return codes, scale


@triton.jit(do_not_specialize=["tokens"])
def quantize_block_kernel(
    x_ptr,
    mean_ptr,
    codes_ptr,
    scale_ptr,
    heads,
    tokens,
    xb,
    xh,
    xn,
    xd,
    HAS_MEAN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """Quantize a block of tokens of one head with one scale."""
    pair = tl.program_id(1).to(tl.int64)
    sample, head = pair // heads, pair % heads
    n, d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, TILE_D)
    valid = (n < tokens)[:, None] & (d < HEAD_DIM)[None, :]
    x = load_tile(x_ptr + sample * xb + head * xh, n, tokens, xn, xd, HEAD_DIM, TILE_D).to(tl.float32)
    if HAS_MEAN:
        mean = tl.load(mean_ptr + pair * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
        x = tl.where(valid, x - mean[None, :], 0.0)
    scale = quantization_scale(tl.max(tl.max(magnitude_bits(x), axis=1), axis=0), 1.0, 127)
    tl.store(scale_ptr + pair * tl.num_programs(0) + tl.program_id(0), scale)
    offsets = ((pair * tokens + n) * HEAD_DIM)[:, None] + d[None, :]
    tl.store(codes_ptr + offsets, quantize(x, scale, 127), mask=valid)


@triton.jit
def _attend(
    query,
    row_scale,
    key_ptr,
    value_ptr,
    mask_ptr,
    key_scale_ptr,
    out,
    highest,
    total,
    n_start,
    m_start,
    queries,
    keys,
    vm,
    vd,
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
    IS_LAST: tl.constexpr,
):
    """Add a block of keys to the output, maximum and sum of a tile of queries."""
    m_tile = tl.arange(0, TILE_M)
    m = m_start + m_tile
    key = load_tile(key_ptr, m, keys, HEAD_DIM, 1, HEAD_DIM, TILE_D)
    value = load_tile(value_ptr, m, keys, vm, vd, HEAD_DIM, TILE_D)
    scale = row_scale * tl.load(key_scale_ptr + m_start // TILE_M)
    scores = matrix_product(query, tl.trans(key), "native", INTERPRET).to(tl.float32) * scale
    if MASK != 0:
        mask = load_mask(
            mask_ptr,
            n_start,
            m_start,
            tl.arange(0, TILE_N)[:, None],
            m_tile[None, :],
            mn,
            mm,
            queries,
            keys,
            PAIR_MASK,
        )
        scores = mask_logits(scores, mask, m[None, :], keys, MASK)
    elif IS_LAST:
        scores = tl.where(m[None, :] < keys, scores, float("-inf"))
    weights, kept, highest, total = softmax_step(scores, highest, total)
    out = out * kept[:, None] + matrix_product(weights.to(value.dtype), value, PRECISION, INTERPRET)
    return out, highest, total


@triton.jit(do_not_specialize=LENGTHS)
def int8_attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    mask_ptr,
    query_scale_ptr,
    key_scale_ptr,
    out_ptr,
    heads,
    queries,
    keys,
    factor,
    vb,
    vh,
    vm,
    vd,
    ob,
    oh,
    on,
    od,
    mb,
    mh,
    mn,
    mm,
    HEAD_DIM: tl.constexpr,
    MASK: tl.constexpr,
    PAIR_MASK: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_D: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Attention of a tile of queries of one head over all keys; codes are contiguous [B, H, N, D]."""
    pair = tl.program_id(1).to(tl.int64)
    sample, head = pair // heads, pair % heads
    n_start = tl.program_id(0) * TILE_N
    n, d = n_start + tl.arange(0, TILE_N), tl.arange(0, TILE_D)
    query = load_tile(query_ptr + pair * queries * HEAD_DIM, n, queries, HEAD_DIM, 1, HEAD_DIM, TILE_D)
    row_scale = tl.load(query_scale_ptr + pair * tl.cdiv(queries, QUERY_BLOCK) + n_start // QUERY_BLOCK) * factor
    key_ptr += pair * keys * HEAD_DIM
    key_scale_ptr += pair * tl.cdiv(keys, TILE_M)
    value_ptr += sample * vb + head * vh
    mask_ptr += sample * mb + head * mh
    out = tl.zeros((TILE_N, TILE_D), tl.float32)
    highest = tl.full((TILE_N,), float("-inf"), tl.float32)
    total = tl.zeros((TILE_N,), tl.float32)
    last = (keys - 1) // TILE_M * TILE_M
    for start in range(0, last, TILE_M):
        out, highest, total = _attend(
            *(query, row_scale, key_ptr, value_ptr, mask_ptr, key_scale_ptr, out, highest, total, n_start, start),
            *(queries, keys, vm, vd, mn, mm, HEAD_DIM, MASK, PAIR_MASK, TILE_N, TILE_M, TILE_D, PRECISION, INTERPRET),
            IS_LAST=False,
        )
    out, highest, total = _attend(
        *(query, row_scale, key_ptr, value_ptr, mask_ptr, key_scale_ptr, out, highest, total, n_start, last),
        *(queries, keys, vm, vd, mn, mm, HEAD_DIM, MASK, PAIR_MASK, TILE_N, TILE_M, TILE_D, PRECISION, INTERPRET),
        IS_LAST=True,
    )
    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    out_ptr += sample * ob + head * oh
    offsets = (n.to(tl.int64) * on)[:, None] + (d * od)[None, :]
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=(n < queries)[:, None] & (d < HEAD_DIM)[None, :])
