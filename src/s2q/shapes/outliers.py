"""The stress variant: outlier channels as large models have them, put in without changing the function.

A few channels are multiplied by a power of two where a block linear reads them and divided by it in that linear's
weights: the input of ``to_q/to_k/to_v`` and of ``ff.net.0.proj`` through the adaptive layer norm, the input of
``to_out`` through ``to_v``. A power of two changes no mantissa, so every product, and with it the full-precision
video, stays as it was.
"""

import torch
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor, nn

OUTLIER_FRACTION = 0.03
OUTLIER_SCALE = 32.0


@torch.no_grad()
def add_outliers(
    transformer: CogVideoXTransformer3DModel,
    *,
    fraction: float = OUTLIER_FRACTION,
    scale: float = OUTLIER_SCALE,
    seed: int = 0,
) -> None:
    """Scale ``fraction`` of the channels up before each block linear and down in its weights, in place.

    Args:
        transformer: A CogVideoX transformer, any floating dtype.
        fraction: Share of the channels of each linear's input, at least one channel.
        scale: A power of two.
        seed: Which channels; different ones in every block.

    Raises:
        ValueError: If ``scale`` is not a power of two, which would not be exact.
    """
    if scale <= 0 or torch.frexp(torch.tensor(scale)).mantissa != 0.5:
        raise ValueError(f"scale={scale} is not a power of two, so the change would not be exact; use 16, 32 or 64")
    generator = torch.Generator().manual_seed(seed)
    for block in transformer.transformer_blocks:
        width = block.attn1.to_q.in_features
        count = max(1, round(fraction * width))
        picks = [torch.randperm(width, generator=generator)[:count] for _ in range(3)]
        attention = block.attn1
        _scale_norm_output(block.norm1, picks[0], scale, (attention.to_q, attention.to_k, attention.to_v))
        _scale_norm_output(block.norm2, picks[1], scale, (block.ff.net[0].proj,))
        attention.to_v.weight[picks[2]] *= scale
        attention.to_v.bias[picks[2]] *= scale
        attention.to_out[0].weight[:, picks[2]] /= scale


def _scale_norm_output(norm: nn.Module, channels: Tensor, scale: float, readers: tuple[nn.Linear, ...]) -> None:
    """Scale channels of ``norm(x) * (1 + scale(t)) + shift(t)``, video and text, and undo it in the readers."""
    norm.norm.weight[channels] *= scale
    norm.norm.bias[channels] *= scale
    width = norm.norm.weight.shape[0]
    for chunk in (0, 3):  # shift and text shift among (shift, scale, gate, text shift, text scale, text gate)
        norm.linear.weight[chunk * width + channels] *= scale
        norm.linear.bias[chunk * width + channels] *= scale
    for reader in readers:
        reader.weight[:, channels] /= scale
