"""From the input of a quantized linear to its codes: shift, scale, low-rank branch, Kronecker, quantization."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from s2q.core.cubes import QuantizedMeans
from s2q.core.input_path import BACKEND_TENSORS, InputTensors
from s2q.ops.activation_path import cpu, reference
from s2q.ops.dispatch import choose_backend, opaque_op, triton_backend

BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor | None]]] = {
    "reference": reference.activation_path,
    "cpu": cpu.activation_path,
    "triton": triton_backend("activation_path"),
}

transform_input = reference.transform_input

__all__ = ["BACKENDS", "activation_path", "transform_input"]


def _shapes(x: Tensor, tensors: Sequence[Any], deflates: bool, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    basis = InputTensors._make([*tensors, deflates, ()]).low_rank_basis
    codes, token_scale = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], 1, dtype=torch.float32)
    rank = 0 if basis is None else basis.shape[1]
    return codes, token_scale, x.new_empty(x.shape[0], rank, dtype=torch.float32)


@opaque_op("activation_path", _shapes)
def _run(
    x: Tensor, tensors: Sequence[Tensor | None], deflates: bool, num_bits: int, backend: str, means: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a backend, for parts that have fields in `InputTensors`; without a basis the coefficients are [M, 0]."""
    path, of_cubes = InputTensors._make([*tensors, deflates, ()]), QuantizedMeans._make(means) if means else None
    codes, token_scale, coefficients = choose_backend(backend, x, BACKENDS)(x, path, num_bits=num_bits, means=of_cubes)
    return codes, token_scale, token_scale.new_empty(len(x), 0) if coefficients is None else coefficients


def activation_path(
    x: Tensor, path: InputTensors, *, num_bits: int, means: QuantizedMeans | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Transform and quantize the input of a linear; see `reference.activation_path`.

    Backends compute the parts that have fields in `InputTensors`; where there are others, torch transforms.

    The backend is "reference", "cpu", "triton", or "auto": Triton where it can run on a GPU, cpu on the CPU.

    Raises:
        InvalidInputError: If there is no such backend, or it cannot run here.
    """
    if path.steps:
        y, coefficients = transform_input(x, path)
        clip = InputTensors(clip_ratio=path.clip_ratio)
        codes, token_scale, _ = activation_path(y, clip, num_bits=num_bits, means=means, backend=backend)
        return codes, token_scale, coefficients
    tensors: tuple[Any, ...] = path[: len(BACKEND_TENSORS)]
    codes, token_scale, coefficients = _run(x, tensors, path.deflates, num_bits, backend, means or ())
    return codes, token_scale, None if path.low_rank_basis is None else coefficients
