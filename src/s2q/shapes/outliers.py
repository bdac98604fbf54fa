"""The stress variants: outlier channels as large models have them, put in without changing the function.

A few channels are multiplied by a power of two where a block linear reads them and divided by it in that linear's
weights: the input of attention's and the feed-forward's first linears through the norm before them, the input of
``to_out`` through ``to_v``. A power of two changes no mantissa, so no product changes. What Wan's blocks
read is ``norm(x) * (1 + scale(t)) + shift(t)``, with one projection of the timestep for all of them: the same channels
are large in every block, and its ``1 + scale(t)`` is rounded anew, in float32.
"""

import torch
from diffusers import CogVideoXTransformer3DModel, WanTransformer3DModel
from torch import Tensor, nn

OUTLIER_FRACTION = 0.03
OUTLIER_SCALE = 32.0


@torch.no_grad()
def add_outliers(
    transformer: CogVideoXTransformer3DModel | WanTransformer3DModel,
    *,
    fraction: float = OUTLIER_FRACTION,
    scale: float = OUTLIER_SCALE,
    seed: int = 0,
) -> None:
    """Scale ``fraction`` of the channels up before each block linear and down in its weights, in place.

    ``scale`` is a power of two. The seed picks other channels in every block, except those that follow Wan's timestep.
    Unchanged are the second linear of a feed-forward and the linears that read the text in Wan's cross-attention.
    """
    if scale <= 0 or torch.frexp(torch.tensor(scale)).mantissa != 0.5:
        raise ValueError(f"scale={scale} is not a power of two, so the change would not be exact; use 16, 32 or 64")
    generator = torch.Generator().manual_seed(seed)
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    count = max(1, round(fraction * width))

    def pick() -> Tensor:
        return torch.randperm(width, generator=generator)[:count]

    if isinstance(transformer, WanTransformer3DModel):
        attention, feed_forward = pick(), pick()
        _add_to_time_projection(transformer, attention, feed_forward, scale)
        for block in transformer.blocks:
            _divide(_projections(block.attn1), attention, scale)
            _divide((block.ffn.net[0].proj,), feed_forward, scale)
            channels = pick()
            _multiply(block.norm2, channels, scale)
            _divide((block.attn2.to_q,), channels, scale)
            for attention_module in (block.attn1, block.attn2):
                _scale_values(attention_module, pick(), scale)
    else:
        for block in transformer.transformer_blocks:
            picks = [pick() for _ in range(3)]
            _scale_norm_output(block.norm1, picks[0], scale, _projections(block.attn1))
            _scale_norm_output(block.norm2, picks[1], scale, (block.ff.net[0].proj,))
            _scale_values(block.attn1, picks[2], scale)


def _projections(attention: nn.Module) -> tuple[nn.Linear, ...]:
    return attention.to_q, attention.to_k, attention.to_v


def _scale_values(attention: nn.Module, channels: Tensor, scale: float) -> None:
    _multiply(attention.to_v, channels, scale)
    _divide((attention.to_out[0],), channels, scale)


def _scale_norm_output(norm: nn.Module, channels: Tensor, scale: float, readers: tuple[nn.Linear, ...]) -> None:
    """Scale channels of CogVideoX's ``norm(x) * (1 + scale(t)) + shift(t)``, video and text, and undo it in readers."""
    _multiply(norm.norm, channels, scale)
    width = norm.norm.weight.shape[0]
    for chunk in (0, 3):  # shift and text shift among (shift, scale, gate, text shift, text scale, text gate)
        _multiply(norm.linear, chunk * width + channels, scale)
    _divide(readers, channels, scale)


def _add_to_time_projection(
    transformer: WanTransformer3DModel, attention: Tensor, feed_forward: Tensor, scale: float
) -> None:
    """Scale channels of Wan's ``1 + scale(t)`` and ``shift(t)``, each the sum of a projection and a block's table."""
    projection = transformer.condition_embedder.time_proj
    width = projection.out_features // 6
    for first, channels in ((0, attention), (3, feed_forward)):  # (shift, scale, gate) of each
        for chunk in (first, first + 1):
            _multiply(projection, chunk * width + channels, scale)
            for block in transformer.blocks:
                block.scale_shift_table[:, chunk, channels] *= scale
        for block in transformer.blocks:
            block.scale_shift_table[:, first + 1, channels] += scale - 1


def _multiply(layer: nn.Module, channels: Tensor, scale: float) -> None:
    layer.weight[channels] *= scale
    layer.bias[channels] *= scale


def _divide(readers: tuple[nn.Linear, ...], channels: Tensor, scale: float) -> None:
    for reader in readers:
        reader.weight[:, channels] /= scale
