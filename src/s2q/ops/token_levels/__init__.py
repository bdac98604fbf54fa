"""From a transformed input to the int8 values of its nearest levels, with a scale per token."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from s2q.ops.dispatch import choose_backend, opaque_op, triton_backend
from s2q.ops.token_levels import cpu, reference

BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": reference.token_levels,
    "cpu": cpu.token_levels,
    "triton": triton_backend("token_levels"),
}

__all__ = ["BACKENDS", "token_levels"]


def _shapes(x: Tensor, *_: Any, **_options: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@opaque_op("token_levels", _shapes)
def token_levels(
    x: Tensor, levels: Tensor, clip_ratio: Tensor | None = None, *, unit: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Quantize each token to the nearest levels; see `reference.token_levels`.

    The backend is "reference", "cpu", "triton", or "auto": Triton where it can run on a GPU, cpu on the CPU.

    Raises:
        InvalidInputError: If there is no such backend, or it cannot run here.
    """
    return choose_backend(backend, x, BACKENDS)(x, levels, clip_ratio, unit=unit)
