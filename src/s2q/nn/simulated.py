"""The integer product of packed linears simulated in fp32, for schemes and input paths without a kernel.

Simulated are inputs in groups, levels that are neither uniform nor int8, and input paths with a part that is restored
after quantization (`InputPart.restore`).
"""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from s2q.common.log import log_once
from s2q.core.input_path import InputTensors
from s2q.core.schemes import QuantScheme
from s2q.core.tokens import current_grid
from s2q.nn.branch import with_float_branch
from s2q.nn.stored import StoredLinear
from s2q.ops.activation_path import transform_input
from s2q.ops.fake_quantize import fake_quantize_input

logger = logging.getLogger(__name__)


def simulated_product(layer: StoredLinear, x: Tensor) -> Tensor:
    """Apply a packed linear to x [..., I], floating; returns [M, O] in the dtype of x."""
    warn_slow(layer.scheme.name, "are simulated in floating point")
    path = layer.input_tensors()
    transformed, coefficients = transform_input(x, path)
    quantized = simulate_quantization(transformed.float(), layer.scheme.activation, path)
    bias = None if layer.bias is None else layer.bias.float()
    output = F.linear(quantized, layer.dequantized_weight(torch.float32), bias).reshape(-1, layer.out_features)
    return with_float_branch(layer, output, coefficients, quantized, x.shape[:-1]).to(x.dtype)


def simulate_quantization(y: Tensor, scheme: QuantScheme | None, path: InputTensors) -> Tensor:
    """Fake-quantize a transformed input y [..., I], trainable, and undo the parts of its path that are restored.

    Without a scheme y is not quantized.
    """
    if scheme is not None:
        grid = None if scheme.delta is None else current_grid()
        y = fake_quantize_input(y, scheme, clip_ratio=path.clip_ratio, grid=grid)
    for part, tensors in reversed(path.steps):
        y = y if part.restore is None else part.restore(y, *tensors)
    return y


def warn_slow(scheme: str, how: str) -> None:
    """Warn once that linears of a scheme are slower than full precision."""
    if not torch.compiler.is_compiling():
        message = "%s linears %s, slower than full precision: no integer kernel takes them"
        log_once(logger, logging.WARNING, message, scheme, how)
