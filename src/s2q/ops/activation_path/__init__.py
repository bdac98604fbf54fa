"""From the input of a quantized linear to its codes: shift, scale, low-rank branch, Kronecker, quantization."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from s2q.core.qparams import ClipRatio
from s2q.ops.activation_path import reference
from s2q.ops.dispatch import choose_backend, triton_backend

BACKENDS: dict[str, Callable[..., Any]] = {
    "reference": reference.activation_path,
    "triton": triton_backend("s2q.ops.activation_path", "activation_path"),
}

__all__ = ["BACKENDS", "activation_path"]


def activation_path(
    x: Tensor,
    *,
    num_bits: int,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    left: Tensor | None = None,
    right: Tensor | None = None,
    low_rank_basis: Tensor | None = None,
    clip_ratio: ClipRatio = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Transform and quantize the input of a linear; see `reference.activation_path` for the arguments.

    Args:
        x: [M, I], floating.
        num_bits: N, 2 to 8.
        shift: fp32 [I] or None.
        scale: fp32 [I] or None.
        left: fp32 [n1, n1] or None.
        right: fp32 [n2, n2] or None.
        low_rank_basis: [I, r] or None.
        clip_ratio: A float, a tensor that broadcasts to [M, 1], or None.
        backend: "reference", "triton", or "auto": Triton where it can run on a GPU.

    Returns:
        codes int8 [M, I], token scale fp32 [M, 1], coefficients fp32 [M, r] or None.

    Raises:
        InvalidInputError: If there is no such backend, or it cannot run here.
    """
    run = choose_backend(backend, x, BACKENDS)
    codes, token_scale, coefficients = run(
        x,
        num_bits=num_bits,
        shift=shift,
        scale=scale,
        left=left,
        right=right,
        low_rank_basis=low_rank_basis,
        clip_ratio=clip_ratio,
    )
    return codes, token_scale, coefficients
