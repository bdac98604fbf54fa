"""Attention whose scores are products of int8 queries and keys."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from s2q.ops.dispatch import choose_backend, opaque_op, triton_backend
from s2q.ops.int8_attention import reference
from s2q.ops.int8_attention.reference import KEY_BLOCK, MAX_HEAD_DIM, QUERY_BLOCK

BACKENDS: dict[str, Callable[..., Tensor]] = {
    "reference": reference.int8_attention,
    "triton": triton_backend("int8_attention"),
}

__all__ = ["BACKENDS", "KEY_BLOCK", "MAX_HEAD_DIM", "QUERY_BLOCK", "int8_attention"]


def _shape(query: Tensor, *_: Any, **_options: Any) -> Tensor:
    return torch.empty_like(query)


@opaque_op("int8_attention", _shape)
def int8_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend with int8 queries and keys, without gradients; see `reference.int8_attention`.

    The backend is "reference", "triton", or "auto": Triton where it can run on a GPU.

    Raises:
        InvalidInputError: If shapes do not fit, or there is no such backend, or it cannot run here.
    """
    return choose_backend(backend, query, BACKENDS)(query, key, value, mask, scale=scale)
