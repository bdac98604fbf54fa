"""Attention that each token receives, without the attention map."""

from collections.abc import Callable

from torch import Tensor

from s2q.common.torch_state import without_autocast
from s2q.ops.attention_colsum import reference
from s2q.ops.dispatch import choose_backend, triton_backend

BACKENDS: dict[str, Callable[..., Tensor]] = {
    "reference": reference.attention_colsum,
    "triton": triton_backend("attention_colsum"),
}

__all__ = ["BACKENDS", "attention_colsum"]


@without_autocast
def attention_colsum(
    query: Tensor,
    key: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sum the attention that each key receives, over all queries and heads; see `reference.attention_colsum`.

    The backend is "reference", "triton", or "auto": Triton where it can run on a GPU.

    Raises:
        InvalidInputError: If shapes do not fit, or there is no such backend, or it cannot run here.
    """
    run = choose_backend(backend, query, BACKENDS)
    return run(query, key, mask=mask, scale=scale, chunk_size=chunk_size)
