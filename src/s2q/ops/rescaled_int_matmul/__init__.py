"""Integer product of two matrices of codes, with the scales, bias and additions of a quantized linear."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from s2q.ops.dispatch import choose_backend, opaque_op, triton_backend
from s2q.ops.level_values import level_values
from s2q.ops.rescaled_int_matmul import cpu, reference

BACKENDS: dict[str, Callable[..., Tensor]] = {
    "reference": reference.rescaled_int_matmul,
    "cpu": cpu.rescaled_int_matmul,
    "triton": triton_backend("rescaled_int_matmul"),
}

__all__ = ["BACKENDS", "rescaled_int_matmul"]


def _shape(
    x_codes: Tensor, x_scale: Tensor, w_codes: Tensor, *_: Any, out_dtype: torch.dtype, **_options: Any
) -> Tensor:
    return x_scale.new_empty(x_codes.shape[0], w_codes.shape[0], dtype=out_dtype)


@opaque_op("rescaled_int_matmul", _shape)
def rescaled_int_matmul(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    low_rank_input: Tensor | None = None,
    low_rank_weight: Tensor | None = None,
    shared_output: Tensor | None = None,
    shared_rows: Tensor | None = None,
    levels: Tensor | None = None,
    group_scale: Tensor | None = None,
    *,
    x_bits: int = 8,
    w_bits: int = 8,
    out_dtype: torch.dtype,
    backend: str = "auto",
) -> Tensor:
    """Multiply codes and rescale the sums; see `reference.rescaled_int_matmul`.

    With levels, int8 [16], or [64] with the bytes of groups, int8 [O, G], w_codes are uint8 [O, P] and their values are
    multiplied (`ops.level_values`); w_bits is the width of the values.

    The backend is "reference", "cpu", "triton", or "auto": Triton where it can run on a GPU, cpu on the CPU. With a
    w_scale [O, G], "auto" and "cpu" run the reference, and "triton" refuses.

    Raises:
        InvalidInputError: If there is no such backend, or it cannot run here.
    """
    run = choose_backend(backend, x_codes, BACKENDS)
    if w_scale.ndim != 1 and backend in ("auto", "cpu"):
        run = reference.rescaled_int_matmul
    more = {}
    if levels is not None and run is cpu.rescaled_int_matmul:
        more = {"levels": levels, "group_scale": group_scale}
    elif levels is not None:
        depth = x_codes.shape[1]
        w_codes = level_values(levels, w_codes, group_scale, in_features=depth, backend=backend)
    return run(
        x_codes,
        x_scale,
        w_codes,
        w_scale,
        bias=bias,
        low_rank_input=low_rank_input,
        low_rank_weight=low_rank_weight,
        shared_output=shared_output,
        shared_rows=shared_rows,
        x_bits=x_bits,
        w_bits=w_bits,
        out_dtype=out_dtype,
        **more,
    )
