"""Column sums of attention, the specification (S²Q-VDiT, eq. 11).

    S_j = Σ_h Σ_i A_hij,    A = softmax(Q Kᵀ / √D + mask)

The N × N map never exists: queries are taken in chunks of `C`, and with the logits of a chunk shifted by their row
maxima the sums are (1/z)ᵀ · exp(logits), z_i = Σ_j exp(logits_ij). Memory is B · N for the result and a few H · C · N
for the chunk, so O(N) in the number of tokens. A query whose keys are all masked attends to nothing and adds 0.

Example, one head, D = 1: q = [0, 0], k = [5, 7] has logits of 0, so each query gives ½ to each key and S = [1, 1].

Shapes: `B` samples, `H` heads, `N` queries, `M` keys (N = M in self-attention), `D` head dim, `C` queries of a chunk.
"""

import torch
from torch import Tensor

from s2q.common.errors import InvalidInputError
from s2q.ops.attention_inputs import check_shapes, score_scale

_CHUNK_BYTES = 32 << 20  # of one chunk's logits on a CPU
_MAX_CHUNK_BYTES = 1 << 30  # on a GPU, where the keys are read again for each chunk


@torch.no_grad()
def attention_colsum(
    query: Tensor, key: Tensor, *, mask: Tensor | None = None, scale: float | None = None, chunk_size: int | None = None
) -> Tensor:
    """Sum the attention that each key receives, over all queries and heads.

    Args:
        query: [B, H, N, D], floating, as attention sees it (after norm and rotary embedding).
        key: [B, H, M, D], same dtype.
        mask: Broadcasts to [B, H, N, M]: boolean, True where a key may be seen; or floating, added to the logits.
        scale: Of the logits; None is 1 / √D.
        chunk_size: C; None takes as many queries as make chunks of 32 MiB, on a GPU of up to 1 GiB by what is free.

    Returns:
        fp32 [B, M] (fp64 for fp64 input), computed and summed so; without any masked query its sum over keys is H · N.

    Raises:
        InvalidInputError: If shapes do not fit or the chunk size is not positive.
    """
    check_shapes(query, key, mask, op="attention_colsum")
    check_chunk(chunk_size)
    samples, heads, queries, _ = query.shape
    keys = key.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    factor = score_scale(query, scale)
    size = chunk_size or max(1, _chunk_bytes_on(query.device) // max(1, heads * keys * dtype.itemsize))
    sums_BM = torch.zeros(samples, keys, dtype=dtype, device=query.device)
    for sample in range(samples):
        key_HDM = key[sample].to(dtype).transpose(1, 2)
        for start in range(0, queries, size):
            query_HCD = query[sample, :, start : start + size].to(dtype) * factor
            logits_HCM = query_HCD @ key_HDM
            if mask is not None:
                _apply_mask(logits_HCM, mask, sample, start)
            sums_BM[sample] += _chunk_sums(logits_HCM)
    return sums_BM


def chunk_bytes(free_bytes: int) -> int:
    """Return the bytes that the logits of a chunk may take on a GPU: a quarter of what is free, 32 MiB to 1 GiB."""
    return min(max(free_bytes // 4, _CHUNK_BYTES), _MAX_CHUNK_BYTES)


def _chunk_bytes_on(device: torch.device) -> int:
    if device.type != "cuda":
        return _CHUNK_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return chunk_bytes(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def _chunk_sums(logits_HCM: Tensor) -> Tensor:
    """Column sums of the softmax over the last axis, [M]; overwrites the logits."""
    highest = logits_HCM.amax(dim=-1, keepdim=True)
    highest.masked_fill_(highest == -torch.inf, 0)  # a fully masked row: exp(-inf - 0) = 0 everywhere
    weights_HCM = logits_HCM.sub_(highest).exp_()
    total_HC1 = weights_HCM.sum(dim=-1, keepdim=True)
    share_HC1 = (1 / total_HC1).masked_fill_(total_HC1 == 0, 0)  # NaN in, NaN out
    return (share_HC1.transpose(1, 2) @ weights_HCM).sum(dim=(0, 1))


def _apply_mask(logits_HCM: Tensor, mask: Tensor, sample: int, start: int) -> None:
    """Apply what a mask has for one sample and the queries of a chunk."""
    mask = mask[(None,) * (4 - mask.ndim)]
    mask = mask[sample if mask.shape[0] > 1 else 0]
    if mask.shape[1] > 1:
        mask = mask[:, start : start + logits_HCM.shape[1]]
    if mask.dtype == torch.bool:
        logits_HCM.masked_fill_(~mask, -torch.inf)
    else:
        logits_HCM.add_(mask)


def check_chunk(chunk_size: int | None) -> None:
    """Refuse chunks of no queries."""
    if chunk_size is not None and chunk_size < 1:
        raise InvalidInputError(f"attention_colsum: got chunk_size={chunk_size}; expected at least 1")
