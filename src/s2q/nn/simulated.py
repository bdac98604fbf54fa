"""The integer product of packed linears simulated in fp32, for schemes and input paths without a kernel.

Simulated are inputs in groups or as differences from local means, levels that are not uniform, and input paths with a
part that is restored after quantization (`InputPart.restore`).
"""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from s2q.common.log import log_once
from s2q.core.qparams import fake_quantize_input
from s2q.core.tokens import current_grid
from s2q.nn.branch import with_float_branch
from s2q.nn.stored import StoredLinear
from s2q.ops.activation_path import transform_input

logger = logging.getLogger(__name__)


def simulated_product(layer: StoredLinear, x: Tensor) -> Tensor:
    """Apply a packed linear to x [..., I], floating; returns [M, O] in the dtype of x."""
    warn_slow(layer.scheme.name, "are simulated in floating point")
    path = layer.input_tensors()
    transformed, coefficients = transform_input(x, path)
    quantized = transformed.float()
    if layer.scheme.activation is not None:
        grid = current_grid() if layer.scheme.needs_grid else None
        quantized = fake_quantize_input(quantized, layer.scheme.activation, clip_ratio=path.clip_ratio, grid=grid)
    for part, tensors in reversed(path.steps):
        quantized = quantized if part.restore is None else part.restore(quantized, *tensors)
    bias = None if layer.bias is None else layer.bias.float()
    output = F.linear(quantized, layer.dequantized_weight(torch.float32), bias).reshape(-1, layer.out_features)
    return with_float_branch(layer, output, coefficients, quantized, x.shape[:-1]).to(x.dtype)


def warn_slow(scheme: str, how: str) -> None:
    """Warn once that linears of a scheme are slower than full precision."""
    if not torch.compiler.is_compiling():
        message = "%s linears %s, slower than full precision: no integer kernel takes them"
        log_once(logger, logging.WARNING, message, scheme, how)
