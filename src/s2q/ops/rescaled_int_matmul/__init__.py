"""Integer product of two matrices of codes, with the scales, bias and addend of a quantized linear applied to it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from s2q.ops.dispatch import choose_backend, triton_backend
from s2q.ops.rescaled_int_matmul import reference

BACKENDS: dict[str, Callable[..., Any]] = {
    "reference": reference.rescaled_int_matmul,
    "triton": triton_backend("s2q.ops.rescaled_int_matmul", "rescaled_int_matmul"),
}

__all__ = ["BACKENDS", "rescaled_int_matmul"]


def rescaled_int_matmul(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    *,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    x_bits: int = 8,
    w_bits: int = 8,
    out_dtype: torch.dtype,
    backend: str = "auto",
) -> Tensor:
    """Multiply codes and rescale the sums; see `reference.rescaled_int_matmul`.

    Args:
        x_codes: int8 [M, K].
        x_scale: fp32 [M, 1].
        w_codes: int8 [O, K], or uint8 as packed by `core.packing`.
        w_scale: fp32 [O].
        bias: [O], floating, or None.
        addend: fp32 [M, O], or None.
        x_bits: Width of the codes of x, at most 8.
        w_bits: Width of the codes of w, at most 8; decides how uint8 codes are packed.
        out_dtype: Floating, of the result.
        backend: "reference", "triton", or "auto": Triton where it can run on a GPU.

    Returns:
        [M, O] in out_dtype.

    Raises:
        InvalidInputError: If there is no such backend, or it cannot run here.
    """
    product: Tensor = choose_backend(backend, x_codes, BACKENDS)(
        x_codes,
        x_scale,
        w_codes,
        w_scale,
        bias=bias,
        addend=addend,
        x_bits=x_bits,
        w_bits=w_bits,
        out_dtype=out_dtype,
    )
    return product
