"""The product of NVFP4 weights and inputs on tensor cores, through `torch._scaled_mm`.

    y = Δ_x · Δ_w · Σ_g s_x s_w Σ_k l_x l_w + b        the sums are the GPU's, rounded to bf16; then fp32

It needs an NVIDIA GPU of compute capability 10.0 or newer; elsewhere the same numbers are simulated (`nn.simulated`).
The GPU reads two levels a byte, the first one low, as sign and magnitude, and scales in tiles of 128 rows by 4 groups
(PTX ISA, "scale_vec::4X"; `swizzled`).

Shapes: `M` tokens, `I/O` in/out features, `G` = I / 16 groups.
"""

import torch
from torch import Tensor

from s2q.common.errors import InvalidInputError
from s2q.core.codebook import levels_of
from s2q.core.fp4 import LARGEST_SCALE
from s2q.core.qparams import group_scale, quantize_weight
from s2q.core.schemes import FP4_GROUPS, NVFP4, QuantScheme
from s2q.nn.branch import with_float_branch
from s2q.nn.stored import StoredLinear
from s2q.ops.activation_path import transform_input
from s2q.ops.dispatch import fp4_obstacle

_TILE_ROWS, _TILE_GROUPS = 128, 4
_ALIGNED = 32  # of I, and 16 of O: what torch._scaled_mm takes


def has_fp4(layer: StoredLinear) -> bool:
    """Tell whether weights and inputs are NVFP4, and nothing else is done to inputs than the product does.

    The other linears of a model run as with the backend "auto".
    """
    weight, activation, path = layer.scheme.weight, layer.scheme.activation, layer.path
    if activation is None or activation.delta is not None or path.estimator or path.simulated:
        return False
    return weight.levels == activation.levels == NVFP4


def fp4_product(layer: StoredLinear, x: Tensor) -> Tensor:
    """Apply a packed linear of NVFP4 weights to x [..., I], floating; returns [M, O] in the dtype of x.

    Raises:
        InvalidInputError: If the hardware has no such product, or none of the shape.
    """
    obstacle = fp4_obstacle(x.device)
    if obstacle is None and (layer.in_features % _ALIGNED or layer.out_features % (_ALIGNED // 2)):
        shape = f"[{layer.out_features}, {layer.in_features}]"
        obstacle = f"got a weight {shape}; expected in features in multiples of 32 and out features of 16"
    if obstacle is not None:
        owner = layer.name or "a quantized linear"
        raise InvalidInputError(f"{owner}: backend 'fp4' cannot run: {obstacle}; use backend='auto' (simulated)")
    activation = layer.scheme.activation
    assert activation is not None
    y, coefficients = transform_input(x, layer.input_tensors())
    clip = layer.activation_clip
    codes, scale = quantize_blocks(y.reshape(-1, layer.in_features), activation, clip_ratio=clip)
    x_blocks, x_scale, x_row = blocks(codes, scale)
    w_blocks, w_scale, w_row = layer.kept.form(layer, "blocks", lambda: blocks(layer.codes(), layer.weight_scale))
    product = torch._scaled_mm(
        x_blocks.view(torch.float4_e2m1fn_x2),
        w_blocks.view(torch.float4_e2m1fn_x2).t(),
        x_scale,
        w_scale,
        out_dtype=torch.bfloat16,
    )
    output = product.float() * x_row * w_row.squeeze(1)
    if layer.bias is not None:
        output += layer.bias.float()
    return with_float_branch(layer, output, coefficients, y, x.shape[:-1]).to(x.dtype)


def quantize_blocks(x: Tensor, scheme: QuantScheme, *, clip_ratio: Tensor | None) -> tuple[Tensor, Tensor]:
    """Quantize tokens [M, I] in groups; returns codes int8 [M, I] and s · Δ, fp32 [M, G]."""
    scale = group_scale(x.reshape(len(x), -1, FP4_GROUPS[NVFP4]), scheme, clip_ratio=clip_ratio)
    levels = levels_of(scheme, x.shape[-1], device=x.device)
    return quantize_weight(x, scale, num_bits=scheme.num_bits, levels=levels), scale


def blocks(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes [R, I] and scales [R, G] as the product takes them: levels, scales in tiles, Δ fp32 [R, 1]."""
    of_groups, row = split_scale(scale)
    return encode(codes), swizzled(of_groups), row


def split_scale(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Split s · Δ, fp32 [R, G], into s, E4M3 [R, G], whose largest is 448 in each row, and Δ, fp32 [R, 1]."""
    row = scale.amax(dim=1, keepdim=True) / LARGEST_SCALE
    return (scale / torch.where(row == 0, torch.ones_like(row), row)).to(torch.float8_e4m3fn), row


def encode(codes: Tensor) -> Tensor:
    """Turn codes int8 [R, I] of `E2M1_LEVELS` into E2M1, two a byte, uint8 [R, I / 2]."""
    nibbles = torch.where(codes < 0, 7 - codes, codes).to(torch.uint8)  # -1 is -0, -8 is -6: the sign and 0 to 7
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4


def swizzled(scale: Tensor) -> Tensor:
    """Put scales [R, G] in the order of the tensor cores, padded to whole tiles; flat.

    A tile of 128 rows by 4 groups is stored row 0, 32, 64, 96, 1, 33, …, four groups each.
    """
    rows, groups = scale.shape
    tall, wide = -(-rows // _TILE_ROWS), -(-groups // _TILE_GROUPS)
    padded = torch.zeros(tall * _TILE_ROWS, wide * _TILE_GROUPS, dtype=torch.uint8, device=scale.device)
    padded[:rows, :groups] = scale.view(torch.uint8)
    tiles = padded.view(tall, 4, 32, wide, _TILE_GROUPS).permute(0, 3, 2, 1, 4)
    return tiles.reshape(-1).view(scale.dtype)
