"""Attention whose scores are products of int8 queries and keys, the specification.

    K̃ = K - mean_j K_j                                     softmax does not change: the same number leaves each score
    Q ≈ Δ_q · q,  K̃ ≈ Δ_k · k                              symmetric int8, Δ = max|·| / 127 of a block of a head
    s_ij = (q_i · k_j) Δ_q Δ_k / √D + mask_ij              an exact whole number, rescaled in fp32
    O_i = Σ_j exp(s_ij - max s_i) V_j / Σ_j exp(s_ij - max s_i)

A block is `QUERY_BLOCK` neighbouring queries, or `KEY_BLOCK` keys. The softmax is online, one block of keys after the
other: exp(s - m), m the maximum so far, is rounded to the dtype of V for the product with V, which is summed in fp32.
The sum in the denominator takes it unrounded. A query whose keys are all masked gets 0.

Source: SageAttention (Zhang et al., 2024, arXiv 2410.02367), whose blocks and smoothing of K these are.

Example, one head, D = 1: keys [10, 12] become [-1, 1] with codes [-127, 127] and Δ_k = 1/127. A query of 1 has code
127, so the scores are -1 and 1, those of full precision less 11.

Shapes: `B` samples, `H` heads, `N` queries, `M` keys (N = M in self-attention), `D` head dim, `C` queries of a chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from s2q.common.errors import InvalidInputError
from s2q.core.qparams import quantize, scale_from_amax
from s2q.ops.attention_inputs import LOG2_E, check_shapes, score_scale

QUERY_BLOCK, KEY_BLOCK = 128, 64
"""Neighbouring tokens of a head that share a scale."""

MAX_HEAD_DIM = 128
"""The widest heads of published video models, and of the tiles of the kernel."""

_NUM_BITS = 8
_CHUNK_VALUES = 1 << 23  # scores of a chunk of queries and a block of keys


@torch.no_grad()
def int8_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """Attend with int8 queries and keys.

    Args:
        query: [B, H, N, D], fp32, fp16 or bf16, as attention sees it (after norm and rotary embedding); D up to 128.
        key: [B, H, M, D], same dtype.
        value: [B, H, M, D], same dtype.
        mask: Broadcasts to [B, H, N, M]: boolean, True where a key may be seen; or floating, added to the scores.
        scale: Of the scores; None is 1 / √D.

    Returns:
        Of the query's shape, dtype and memory layout.

    Raises:
        InvalidInputError: If shapes do not fit, or D is above 128.
    """
    check_inputs(query, key, value, mask)
    samples, heads, queries, _ = query.shape
    keys, result = key.shape[2], torch.empty_like(query)
    codes_BHND, scale_BHN1 = quantize_blocks(query.float(), QUERY_BLOCK)
    row_scale_BHN1 = scale_BHN1 * (score_scale(query, scale) * LOG2_E)
    keys_BHMD, key_scale_BHM1 = quantize_blocks(key.float() - token_mean(key), KEY_BLOCK)
    codes_BHND, keys_BHMD, value_BHMD = codes_BHND.float(), keys_BHMD.float(), value.float()  # sums stay exact
    full_mask = None if mask is None else mask.expand(samples, heads, queries, keys)
    size = max(1, _CHUNK_VALUES // max(1, samples * heads * KEY_BLOCK))
    for first in range(0, queries, size):
        rows = slice(first, first + size)
        query_BHCD = codes_BHND[:, :, rows]
        highest = query_BHCD.new_full((*query_BHCD.shape[:3], 1), -torch.inf)
        total, out_BHCD = torch.zeros_like(highest), torch.zeros_like(query_BHCD)
        for start in range(0, keys, KEY_BLOCK):
            block = slice(start, start + KEY_BLOCK)
            scores = query_BHCD @ keys_BHMD[:, :, block].transpose(-1, -2)
            scores *= row_scale_BHN1[:, :, rows] * key_scale_BHM1[:, :, start : start + 1]
            if full_mask is not None:
                scores = _masked(scores, full_mask[:, :, rows, block])
            raised = torch.maximum(highest, scores.amax(dim=-1, keepdim=True))
            pivot = raised.masked_fill(raised == -torch.inf, 0)  # -inf - -inf is NaN
            weights, kept = torch.exp2(scores - pivot), torch.exp2(highest - pivot)
            total = total * kept + weights.sum(dim=-1, keepdim=True)
            out_BHCD = out_BHCD * kept + weights.to(value.dtype).float() @ value_BHMD[:, :, block]
            highest = raised
        result[:, :, rows] = out_BHCD / total.masked_fill(total == 0, 1)
    return result


def quantize_blocks(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Quantize blocks of `size` tokens of x, fp32 [B, H, N, D]: int8 codes, and scales by token [B, H, N, 1]."""
    samples, heads, tokens, head_dim = x.shape
    blocks = F.pad(x, (0, 0, 0, -tokens % size)).reshape(samples, heads, -1, size, head_dim)
    scale = scale_from_amax(blocks.abs().amax(dim=(-1, -2), keepdim=True), num_bits=_NUM_BITS)
    codes = quantize(blocks, scale, num_bits=_NUM_BITS)
    return codes.flatten(2, 3)[:, :, :tokens], scale.expand(*blocks.shape[:-1], 1).flatten(2, 3)[:, :, :tokens]


def token_mean(key: Tensor) -> Tensor:
    """The mean of the keys of each head over the tokens, fp32 [B, H, 1, D]."""
    return key.mean(dim=2, keepdim=True, dtype=torch.float32)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    return scores + mask.float() * LOG2_E


def check_inputs(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    """Refuse arguments of `int8_attention` that do not fit together."""
    check_shapes(query, key, mask, op="int8_attention")
    if value.shape != key.shape:
        raise InvalidInputError(
            f"int8_attention: got keys {list(key.shape)} and values {list(value.shape)}; expected the same shape"
        )
    if query.shape[-1] > MAX_HEAD_DIM:
        raise InvalidInputError(
            f"int8_attention: got heads of {query.shape[-1]} features; expected at most {MAX_HEAD_DIM}"
        )
