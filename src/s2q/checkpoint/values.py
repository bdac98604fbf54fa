"""Checks of the values in a checkpoint, whoever made its manifest: codes in range, finite, positive, invertible."""

import torch
from torch import Tensor, nn

from s2q.common.errors import InvalidInputError
from s2q.core.schemes import UNIFORM, LinearScheme

_FACTORS = ("transform_left", "transform_right")


def value_problem(tensor: str, value: Tensor, scheme: LinearScheme, *, in_features: int) -> str | None:
    """Return what is wrong with a tensor of a packed linear, by its name there; None if nothing is."""
    if tensor == "weight":
        return _code_problem(value, scheme.weight.num_bits, in_features=in_features)
    if tensor == "weight_scale":
        zeros = scheme.weight.levels != UNIFORM  # there, a channel of zeros has a scale of 0
        if not bool((torch.isfinite(value) & ((value >= 0) if zeros else (value > 0))).all()):
            return "contains scales that are not positive and finite"
    if not bool(torch.isfinite(value).all()):
        return "contains NaN or infinite values"
    if tensor == "weight_scale":  # the sum of a row of the largest codes; a product by activations is larger still
        largest = float(value.max()) * in_features * 2 ** (scheme.weight.product_bits - 1)
        if largest > torch.finfo(torch.float32).max:
            return f"contains scales up to {float(value.max()):.1e}, with which a product overflows"
    if tensor == "activation_clip" and not bool(((value > 0) & (value <= 1)).all()):
        return "contains a ratio outside (0, 1]"
    if tensor == "transform_scale" and not bool(value.all()):  # its signs may be a rotation's
        return "contains zeros, so the transform has no inverse"
    if tensor in _FACTORS and not bool(torch.linalg.slogdet(value.double()).logabsdet.isfinite()):
        return "is a matrix without an inverse"
    return None


def check_finite(model: nn.Module, *, remedy: str) -> None:
    """Refuse a loaded model with NaN or infinite values among its parameters."""
    for name, value in model.named_parameters():
        if value.is_floating_point() and value.itemsize > 1 and value.numel() and not value.is_meta:
            low, high = torch.aminmax(value.detach())  # without a mask as large as the parameter; NaN stays NaN
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                raise InvalidInputError(f"{name}: contains NaN or infinite values; {remedy}")


def _code_problem(packed: Tensor, num_bits: int, *, in_features: int) -> str | None:
    """Return what is wrong with packed codes (`core.packing`): 8 bits are any byte, 4 any nibble except the padding."""
    limit = 1 << (num_bits - 1)
    if num_bits > 4:
        low, high = (int(bound) for bound in torch.aminmax(packed.view(torch.int8)))
    elif num_bits == 4:
        low, high = -limit, limit - 1
    else:
        low, high = (int(bound) - 8 for bound in torch.aminmax(torch.stack([packed & 15, packed >> 4])))
    if low < -limit or high >= limit:
        return f"contains codes {low} to {high}, expected {-limit} to {limit - 1} of {num_bits} bits"
    if num_bits <= 4 and in_features % 2 and bool((packed[:, -1] >> 4 != 8).any()):
        return "contains codes other than 0 where its rows are padded"
    return None
