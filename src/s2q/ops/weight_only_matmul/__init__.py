"""Product of floating-point rows with a packed integer weight: linears whose input is not quantized (adaLN, text)."""

from collections.abc import Callable

import torch
from torch import Tensor, library

from s2q.common.torch_state import without_autocast
from s2q.ops.dispatch import choose_backend, triton_backend
from s2q.ops.weight_only_matmul import cpu, reference

BACKENDS: dict[str, Callable[..., Tensor]] = {
    "reference": reference.weight_only_matmul,
    "cpu": cpu.weight_only_matmul,
    "triton": triton_backend("s2q.ops.weight_only_matmul", "weight_only_matmul"),
}

__all__ = ["BACKENDS", "weight_only_matmul"]


@without_autocast
def weight_only_matmul(
    x: Tensor, w_codes: Tensor, w_scale: Tensor, *, bias: Tensor | None = None, w_bits: int = 8, backend: str = "auto"
) -> Tensor:
    """Multiply rows with the dequantized weight; see `reference.weight_only_matmul`.

    The backend is "reference", "cpu", "triton", or "auto": Triton where it can run on a GPU, cpu on the CPU.

    Raises:
        InvalidInputError: If there is no such backend, or it cannot run here.
    """
    run = _traced if torch.compiler.is_compiling() else _run
    product: Tensor = run(x, w_codes, w_scale, bias, w_bits, backend)
    return product


def _run(x: Tensor, w_codes: Tensor, w_scale: Tensor, bias: Tensor | None, w_bits: int, backend: str) -> Tensor:
    run: Callable[..., Tensor] = choose_backend(backend, x, BACKENDS)
    return run(x, w_codes, w_scale, bias=bias, w_bits=w_bits)


_traced = library.custom_op("s2q::weight_only_matmul", _run, mutates_args=())
"""The same for torch.compile, which does not look inside."""


@_traced.register_fake
def _shape(x: Tensor, w_codes: Tensor, w_scale: Tensor, bias: Tensor | None, w_bits: int, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], w_codes.shape[0])
