"""Rounding to nearest (RTN): each weight on its own, half to even (S²Q-VDiT, eq. 1), or to the nearest level."""

import torch
from torch import Tensor

from s2q.core.codebook import levels_of
from s2q.core.qparams import ClipRatio, RoundedWeight, quantize_weight, weight_scale
from s2q.core.schemes import QuantScheme
from s2q.rounding.table import round_table


@torch.no_grad()
def round_rtn(weight: Tensor, scheme: QuantScheme, *, clip_ratio: ClipRatio = None) -> RoundedWeight:
    """Round a weight [O, I] to the nearest codes, in fp32, on its device; the clip ratio broadcasts to the scale."""
    if scheme.has_table:
        return round_table(weight, scheme, clip_ratio=clip_ratio)
    scale = weight_scale(weight, scheme, clip_ratio=clip_ratio)
    levels = levels_of(scheme, weight.shape[1], device=weight.device)
    codes = quantize_weight(weight, scale, num_bits=scheme.num_bits, levels=levels)
    return RoundedWeight(codes=codes, scale=scale)
