"""From the input of a quantized linear to its codes: shift, scale, low-rank branch, Kronecker, quantization."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library

from s2q.common.torch_state import without_autocast
from s2q.core.qparams import ClipRatio
from s2q.ops.activation_path import cpu, reference
from s2q.ops.dispatch import choose_backend, triton_backend

BACKENDS: dict[str, Callable[..., Any]] = {
    "reference": reference.activation_path,
    "cpu": cpu.activation_path,
    "triton": triton_backend("s2q.ops.activation_path", "activation_path"),
}

transform_input = reference.transform_input

__all__ = ["BACKENDS", "activation_path", "transform_input"]


@without_autocast
def activation_path(
    x: Tensor,
    *,
    num_bits: int,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    left: Tensor | None = None,
    right: Tensor | None = None,
    low_rank_basis: Tensor | None = None,
    deflates: bool = True,
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
        deflates: Whether what goes through the branch is taken out of what is quantized.
        clip_ratio: A float, a tensor that broadcasts to [M, 1], or None.
        backend: "reference", "cpu", "triton", or "auto": Triton where it can run on a GPU, cpu on the CPU.

    Returns:
        codes int8 [M, I], token scale fp32 [M, 1], coefficients fp32 [M, r] or None.

    Raises:
        InvalidInputError: If there is no such backend, or it cannot run here.
    """
    if not torch.compiler.is_compiling():
        return _run(x, num_bits, shift, scale, left, right, low_rank_basis, deflates, clip_ratio, backend)
    ratio = x.new_tensor(clip_ratio, dtype=torch.float32) if isinstance(clip_ratio, float) else clip_ratio
    codes, token_scale, coefficients = _traced(
        x, num_bits, shift, scale, left, right, low_rank_basis, deflates, ratio, backend
    )
    return codes, token_scale, None if low_rank_basis is None else coefficients


def _run(
    x: Tensor,
    num_bits: int,
    shift: Tensor | None,
    scale: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    low_rank_basis: Tensor | None,
    deflates: bool,
    clip_ratio: ClipRatio,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    codes, token_scale, coefficients = choose_backend(backend, x, BACKENDS)(
        x,
        num_bits=num_bits,
        shift=shift,
        scale=scale,
        left=left,
        right=right,
        low_rank_basis=low_rank_basis,
        deflates=deflates,
        clip_ratio=clip_ratio,
    )
    return codes, token_scale, coefficients


@library.custom_op("s2q::activation_path", mutates_args=())
def _traced(
    x: Tensor,
    num_bits: int,
    shift: Tensor | None,
    scale: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    low_rank_basis: Tensor | None,
    deflates: bool,
    clip_ratio: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for torch.compile, which does not look inside; without a basis the coefficients are [M, 0]."""
    codes, token_scale, coefficients = _run(
        x, num_bits, shift, scale, left, right, low_rank_basis, deflates, clip_ratio, backend
    )
    return codes, token_scale, token_scale.new_empty(len(x), 0) if coefficients is None else coefficients


@_traced.register_fake
def _shapes(
    x: Tensor,
    num_bits: int,
    shift: Tensor | None,
    scale: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    low_rank_basis: Tensor | None,
    deflates: bool,
    clip_ratio: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rank = 0 if low_rank_basis is None else low_rank_basis.shape[1]
    codes, token_scale = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], 1, dtype=torch.float32)
    return codes, token_scale, x.new_empty(x.shape[0], rank, dtype=torch.float32)
