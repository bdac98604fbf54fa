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
"""A power of two, so that the change is exact."""


@torch.no_grad()
def add_outliers(transformer: CogVideoXTransformer3DModel | WanTransformer3DModel) -> None:
    """Scale a few channels up before each block linear and down in its weights, in place.

    The channels are others in every block, except those that follow Wan's timestep. Unchanged are the second linear of
    a feed-forward and the linears that read the text in Wan's cross-attention.
    """
    generator = torch.Generator().manual_seed(0)
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    count = max(1, round(OUTLIER_FRACTION * width))

    def pick() -> Tensor:
        return torch.randperm(width, generator=generator)[:count]

    if isinstance(transformer, WanTransformer3DModel):
        attention, feed_forward = pick(), pick()
        _add_to_time_projection(transformer, attention, feed_forward)
        for block in transformer.blocks:
            _divide(_projections(block.attn1), attention)
            _divide((block.ffn.net[0].proj,), feed_forward)
            channels = pick()
            _multiply(block.norm2, channels)
            _divide((block.attn2.to_q,), channels)
            for attention_module in (block.attn1, block.attn2):
                _scale_values(attention_module, pick())
    else:
        for block in transformer.transformer_blocks:
            _scale_norm_output(block.norm1, pick(), _projections(block.attn1))
            _scale_norm_output(block.norm2, pick(), (block.ff.net[0].proj,))
            _scale_values(block.attn1, pick())


def _projections(attention: nn.Module) -> tuple[nn.Linear, ...]:
    return attention.to_q, attention.to_k, attention.to_v


def _scale_values(attention: nn.Module, channels: Tensor) -> None:
    _multiply(attention.to_v, channels)
    _divide((attention.to_out[0],), channels)


def _scale_norm_output(norm: nn.Module, channels: Tensor, readers: tuple[nn.Linear, ...]) -> None:
    """Scale channels of CogVideoX's ``norm(x) * (1 + scale(t)) + shift(t)``, video and text, and undo it in readers."""
    _multiply(norm.norm, channels)
    width = norm.norm.weight.shape[0]
    for chunk in (0, 3):  # shift and text shift among (shift, scale, gate, text shift, text scale, text gate)
        _multiply(norm.linear, chunk * width + channels)
    _divide(readers, channels)


def _add_to_time_projection(transformer: WanTransformer3DModel, attention: Tensor, feed_forward: Tensor) -> None:
    """Scale channels of Wan's ``1 + scale(t)`` and ``shift(t)``, each the sum of a projection and a block's table."""
    projection = transformer.condition_embedder.time_proj
    width = projection.out_features // 6
    for first, channels in ((0, attention), (3, feed_forward)):  # (shift, scale, gate) of each
        for chunk in (first, first + 1):
            _multiply(projection, chunk * width + channels)
        for block in transformer.blocks:
            block.scale_shift_table[:, first : first + 2, channels] *= OUTLIER_SCALE
            block.scale_shift_table[:, first + 1, channels] += OUTLIER_SCALE - 1


def _multiply(layer: nn.Module, channels: Tensor) -> None:
    layer.weight[channels] *= OUTLIER_SCALE
    layer.bias[channels] *= OUTLIER_SCALE


def _divide(readers: tuple[nn.Linear, ...], channels: Tensor) -> None:
    for reader in readers:
        reader.weight[:, channels] /= OUTLIER_SCALE
