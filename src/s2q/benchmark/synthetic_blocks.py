"""Blocks of published transformers with random weights, and random inputs for them.

A block is built on the device by itself, each of its linears straight in the form that it is to have (packed, or full
precision), so that a full-precision copy of the whole model never exists.

Legend: `B` samples in a call, `N` video tokens, `T` text tokens, `d` channels, `D` head dim, `I/O` in/out features.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from s2q.common.fp32_modules import convert, kept_in_fp32
from s2q.core.codebook import MAX_LEVEL
from s2q.core.packing import pack_codes
from s2q.core.qparams import code_range
from s2q.core.tokens import TokenGrid
from s2q.models.attention import use_attention_registry
from s2q.models.family import BlockLinear, linears_of_block, token_layout
from s2q.models.synthetic import BlockList, SyntheticModel
from s2q.nn import PackedLinear, look_up_activations, replace_module, share_inputs
from s2q.planning.resolve import LinearPlan
from s2q.transforms import orthogonal_matrix

LinearOf = Callable[[BlockLinear], nn.Module | None]
"""Makes the module that replaces a linear of a block; None leaves it in full precision."""

_NORM_STD = 0.05


def synthetic_block(
    model: SyntheticModel,
    block_list: BlockList,
    *,
    generator: torch.Generator,
    dtype: torch.dtype = torch.bfloat16,
    linear_of: LinearOf | None = None,
) -> nn.Module:
    """Build one block with random weights, in evaluation mode, where the generator is.

    What stays in full precision has the given dtype, or fp32 where the model keeps that.
    """
    transformer = model.meta_transformer(blocks=1)
    block: nn.Module = getattr(transformer, block_list.name)[0].to(dtype)
    convert(block, dtype, kept=kept_in_fp32(transformer))
    for linear in linears_of_block(block, f"{block_list.name}.0", model.family):
        replacement = None if linear_of is None else linear_of(linear)
        if replacement is not None:
            replace_module(block, linear.inner_name, replacement)
    for module in block.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = _random_parameter(name, parameter, generator)
                module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    use_attention_registry(block)
    share_inputs(block)
    look_up_activations(block)
    return block.eval().requires_grad_(False)


def random_packed_linear(
    linear: LinearPlan, *, generator: torch.Generator, dtype: torch.dtype = torch.bfloat16
) -> PackedLinear:
    """Build a packed linear with random codes; its output is about as large as its input."""
    device, shape = generator.device, (linear.out_features, linear.in_features)
    layer = PackedLinear(
        linear.in_features,
        linear.out_features,
        bias=linear.has_bias,
        scheme=linear.scheme,
        path=linear.path,
        dtype=dtype,
        device=device,
    )
    weight = linear.scheme.weight
    lowest, highest = code_range(weight.num_bits)
    codes = torch.randint(lowest, highest + 1, shape, dtype=torch.int8, device=device, generator=generator)
    layer.weight.data.copy_(pack_codes(codes, num_bits=weight.num_bits))
    layer.weight_scale.data.fill_(math.sqrt(3 / linear.in_features) / code_range(weight.product_bits)[1])
    if layer.weight_group_scale is not None:
        layer.weight_group_scale.data.fill_(MAX_LEVEL)
    if linear.has_bias:
        layer.bias.data.zero_()
    of_input = torch.Generator(device).manual_seed(0)  # equal in linears that read the same input: they share its codes
    for name, shape_of in layer.path.shapes(linear.in_features, linear.out_features).items():
        tensor = getattr(layer, name).data
        if name in ("transform_left", "transform_right"):
            tensor.copy_(orthogonal_matrix(shape_of[0]))
        elif name == "low_rank_basis":
            tensor.normal_(std=shape_of[0] ** -0.5, generator=of_input)
        elif name == "low_rank_weight":
            tensor.normal_(std=shape_of[0] ** -0.5, generator=generator)
        else:
            tensor.fill_(0.0 if name == "input_shift" else 1.0)
    return layer


def block_inputs(
    model: SyntheticModel,
    block_list: BlockList,
    *,
    tokens: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.bfloat16,
    batch: int | None = None,
) -> dict[str, Any]:
    """Draw the arguments of a block's call.

    Args:
        dtype: Of the two streams.
        batch: B; None is the model's own.

    Returns:
        Keyword arguments; `hidden_states` [B, N, d] and `encoder_hidden_states` [B, T, d], or what the family's blocks
        call them, are always among them, the text and the sound in the first where the family has one stream.
    """
    samples = model.batch if batch is None else batch

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=generator.device, dtype=torch.float32).to(dtype)

    video = model.family.block_argument("hidden_states")
    streams = {video: normal(samples, tokens + model.beside_video, model.width)}
    if not model.family.is_packed:
        text = model.family.block_argument("encoder_hidden_states")
        streams[text] = normal(samples, model.text_tokens, model.width)
    return streams | BLOCK_INPUTS[block_list.inputs](model, samples, tokens, normal)


def block_grid(model: SyntheticModel, *, tokens: int) -> TokenGrid:
    """Return a grid of N video tokens with as many frames as the model has, or the next smaller divisor of N."""
    text = token_layout(model.meta_transformer(blocks=1), model.family).text
    grid = video_grid(tokens, frames=model.frames)
    beside = model.beside_video or model.text_tokens
    return replace(grid, text_tokens=0 if text == "apart" else beside, text=text)


def token_positions(model: SyntheticModel, grid: TokenGrid) -> dict[str, Any]:
    """Return the arguments of a transformer's call that say where its tokens are: sizes, or coordinates on the CPU."""
    sizes = grid.frames, grid.height, grid.width
    if not model.family.is_packed:
        return dict(zip(("num_frames", "height", "width"), sizes, strict=True))
    video = torch.cartesian_prod(*(torch.arange(size) for size in sizes))
    return {
        "position_ids": torch.cat([torch.zeros(grid.text_tokens, 3, dtype=video.dtype), video]),
        "video_indices": torch.arange(grid.text_tokens, grid.text_tokens + len(video)),
        "text_indices": torch.arange(model.text_tokens),
    }


def video_grid(tokens: int, *, frames: int) -> TokenGrid:
    """Return a grid of N video tokens without text, of so many frames, or the next smaller divisor of N."""
    frames = _divisor(tokens, most=frames)
    height = _divisor(tokens // frames, most=math.isqrt(tokens // frames))
    return TokenGrid(frames=frames, height=height, width=tokens // frames // height)


def _divisor(value: int, *, most: int) -> int:
    return next(divisor for divisor in range(most, 0, -1) if value % divisor == 0)


def _cogvideox_inputs(model: SyntheticModel, batch: int, tokens: int, normal: Callable[..., Tensor]) -> dict[str, Any]:
    rotary = model.config["use_rotary_positional_embeddings"]
    angles = normal(tokens, model.head_dim, dtype=torch.float32) if rotary else None
    return {
        "temb": normal(batch, model.config.get("time_embed_dim", 512)),
        "image_rotary_emb": None if angles is None else (angles.cos(), angles.sin()),
    }


def _hunyuanvideo_inputs(
    model: SyntheticModel, batch: int, tokens: int, normal: Callable[..., Tensor]
) -> dict[str, Any]:
    angles = normal(tokens, model.head_dim, dtype=torch.float32)
    temb = normal(batch, model.heads * model.head_dim)
    mask = torch.ones(batch, 1, 1, tokens + model.text_tokens, dtype=torch.bool, device=temb.device)
    rotary = (angles.cos(), angles.sin())
    return {"temb": temb, "attention_mask": mask, "freqs_cis": rotary, "image_rotary_emb": rotary}


def _wan_inputs(model: SyntheticModel, batch: int, tokens: int, normal: Callable[..., Tensor]) -> dict[str, Any]:
    angles = normal(1, tokens, 1, model.head_dim, dtype=torch.float32)
    return {"temb": normal(batch, 6, model.heads * model.head_dim), "rotary_emb": (angles.cos(), angles.sin())}


def _wan_image_inputs(model: SyntheticModel, batch: int, tokens: int, normal: Callable[..., Tensor]) -> dict[str, Any]:
    text = normal(batch, model.image_tokens + model.text_tokens, model.heads * model.head_dim)
    return {**_wan_inputs(model, batch, tokens, normal), "encoder_hidden_states": text}


def _sana_inputs(model: SyntheticModel, batch: int, tokens: int, normal: Callable[..., Tensor]) -> dict[str, Any]:
    angles = normal(1, tokens, 1, model.head_dim, dtype=torch.float32)
    grid = video_grid(tokens, frames=model.frames)
    sizes = {"frames": grid.frames, "height": grid.height, "width": grid.width}
    time = normal(batch, 1, 6 * model.heads * model.head_dim)
    return {"timestep": time, "rotary_emb": (angles.cos(), angles.sin()), **sizes}


def _skyreels_inputs(model: SyntheticModel, batch: int, tokens: int, normal: Callable[..., Tensor]) -> dict[str, Any]:
    return {**_wan_inputs(model, batch, tokens, normal), "attention_mask": None}


def _wan_vace_inputs(model: SyntheticModel, batch: int, tokens: int, normal: Callable[..., Tensor]) -> dict[str, Any]:
    control = normal(batch, tokens, model.heads * model.head_dim)
    return {**_wan_inputs(model, batch, tokens, normal), "control_hidden_states": control}


def _kandinsky5_inputs(model: SyntheticModel, batch: int, tokens: int, normal: Callable[..., Tensor]) -> dict[str, Any]:
    time = normal(batch, int(model.config["time_dim"]), dtype=torch.float32)
    rotary = normal(1, tokens, 1, model.head_dim // 2, 2, 2, dtype=torch.float32)
    return {"time_embed": time, "rope": rotary, "sparse_params": None}


def _ltx_inputs(model: SyntheticModel, batch: int, tokens: int, normal: Callable[..., Tensor]) -> dict[str, Any]:
    width = model.heads * model.head_dim
    angles = normal(batch, tokens, width, dtype=torch.float32)
    return {"temb": normal(batch, 1, 6 * width), "image_rotary_emb": (angles.cos(), angles.sin())}


def _ltx2_inputs(model: SyntheticModel, batch: int, tokens: int, normal: Callable[..., Tensor]) -> dict[str, Any]:
    config, sound = model.config, model.audio_tokens
    heads, sound_heads = model.heads, int(config["audio_num_attention_heads"])
    width, sound_width = heads * model.head_dim, sound_heads * int(config["audio_attention_head_dim"])
    modulated = config.get("cross_attn_mod", False)
    parameters = 9 if modulated else 6

    def rotary(heads: int, tokens: int, width: int) -> tuple[Tensor, Tensor]:
        angles = normal(batch, heads, tokens, width // heads // 2, dtype=torch.float32)
        return angles.cos(), angles.sin()

    return {
        "audio_hidden_states": normal(batch, sound, sound_width),
        "audio_encoder_hidden_states": normal(batch, model.text_tokens, int(config["audio_cross_attention_dim"])),
        "temb": normal(batch, 1, parameters * width),
        "temb_audio": normal(batch, 1, parameters * sound_width),
        "temb_ca_scale_shift": normal(batch, 1, 4 * width),
        "temb_ca_audio_scale_shift": normal(batch, 1, 4 * sound_width),
        "temb_ca_gate": normal(batch, 1, width),
        "temb_ca_audio_gate": normal(batch, 1, sound_width),
        "temb_prompt": normal(batch, 1, 2 * width) if modulated else None,
        "temb_prompt_audio": normal(batch, 1, 2 * sound_width) if modulated else None,
        "video_rotary_emb": rotary(heads, tokens, width),
        "audio_rotary_emb": rotary(sound_heads, sound, sound_width),
        "ca_video_rotary_emb": rotary(sound_heads, tokens, sound_width),
        "ca_audio_rotary_emb": rotary(sound_heads, sound, sound_width),
    }


def _minimax_h3_inputs(model: SyntheticModel, batch: int, tokens: int, normal: Callable[..., Tensor]) -> dict[str, Any]:
    """Two timesteps, of the video (which the text shares) and of the sound, each for three kinds of tokens."""
    rows = torch.tensor([1] * model.text_tokens + [3 + 2] * model.audio_tokens + [0] * tokens)
    angles = normal(len(rows), 6 * int(model.config["rope_freq_dim"]), dtype=torch.float32)
    temb = normal(2, int(model.config["time_embed_dim"]), dtype=torch.float32)
    return {"temb": temb, "adaln_indices": rows.to(temb.device), "rotary_emb": (angles.cos(), angles.sin())}


BLOCK_INPUTS: dict[str, Callable[..., dict[str, Any]]] = {
    "cogvideox": _cogvideox_inputs,
    "hunyuanvideo": _hunyuanvideo_inputs,
    "kandinsky5": _kandinsky5_inputs,
    "ltx": _ltx_inputs,
    "ltx-2": _ltx2_inputs,
    "minimax-h3": _minimax_h3_inputs,
    "sana-video": _sana_inputs,
    "skyreels": _skyreels_inputs,
    "wan": _wan_inputs,
    "wan-image": _wan_image_inputs,
    "wan-vace": _wan_vace_inputs,
}
"""Arguments of a block besides its two streams, by family: a function of model, B, N and a noise source."""


def _random_parameter(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    """A matrix keeps the size of its input; the weight of a norm is about 1, a bias 0."""
    value = torch.zeros(parameter.shape, dtype=parameter.dtype, device=generator.device)
    if parameter.ndim > 1:
        inputs = parameter[0].numel() if parameter.ndim > 3 else parameter.shape[-1]  # of a convolution, or a matrix
        value.normal_(std=inputs**-0.5, generator=generator)
    elif name != "bias":
        value.normal_(1.0, _NORM_STD, generator=generator)
    return value
