"""From packed codes of a weight to the int8 values of their levels, which integer products multiply."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from s2q.ops.dispatch import choose_backend, opaque_op, triton_backend
from s2q.ops.level_values import cpu, reference

BACKENDS: dict[str, Callable[..., Tensor]] = {
    "reference": reference.level_values,
    "cpu": cpu.level_values,
    "triton": triton_backend("level_values"),
}

__all__ = ["BACKENDS", "level_values"]


def _shape(levels: Tensor, packed: Tensor, *_: Any, in_features: int, **_options: Any) -> Tensor:
    return packed.new_empty(packed.shape[0], in_features, dtype=torch.int8)


@opaque_op("level_values", _shape)
def level_values(
    levels: Tensor, packed: Tensor, group_scale: Tensor | None = None, *, in_features: int, backend: str = "auto"
) -> Tensor:
    """Look up the levels of packed codes; see `reference.level_values`. All backends return the same values.

    The backend is "reference", "cpu", "triton", or "auto": Triton where it can run on a GPU, cpu on the CPU.

    Raises:
        InvalidInputError: If there is no such backend, it cannot run here, or the codes have another width.
    """
    return choose_backend(backend, levels, BACKENDS)(levels, packed, group_scale, in_features=in_features)
