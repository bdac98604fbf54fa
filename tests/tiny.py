"""Tiny random CogVideoX pipelines, built in memory without any download, for tests that need some pipeline.

Everything is a function of `seed`. A call with `TINY_CALL` takes a fraction of a second on one CPU core.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from transformers import (
    ByT5Tokenizer,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from s2q.models.synthetic import SyntheticModel, synthetic_model
from s2q.ops.activation_path import transform_input

TEXT_LENGTH = 16
"""`max_text_seq_length` of the tiny transformers, in tokens."""

TINY_CALL: dict[str, Any] = {
    "num_inference_steps": 2,
    "height": 16,
    "width": 16,
    "num_frames": 9,
    "max_sequence_length": TEXT_LENGTH,
}
"""Arguments of a pipeline call that the tiny pipelines take: 9 frames (3 latent ones) of 16 x 16 pixels."""


def tiny_tokenizer(words: Sequence[str] = ()) -> T5Tokenizer:
    """A character-level T5 tokenizer, words that are given apart; ids 0, 1, 2 are padding, end of sequence, unknown."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(character, -3.0) for character in string.ascii_letters + string.digits + string.punctuation]
    pieces += [(f"▁{word}", -1.0) for word in words]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def tiny_text_encoder(*, seed: int = 0, width: int = 32) -> T5EncoderModel:
    """A random two-layer T5 encoder in evaluation mode."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=128,
        d_model=width,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8,
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config).eval()


def tiny_transformer(
    *, seed: int = 0, num_layers: int = 2, rotary: bool = False, patch_size_t: int | None = None, in_channels: int = 4
) -> CogVideoXTransformer3DModel:
    """A random CogVideoX transformer: hidden size 64 (4 heads of 16), feed-forward 256, 4 latent channels.

    With `patch_size_t` it is one of version 1.5, whose tokens are patches in time too; with 8 `in_channels` it sees the
    latent of an image behind that of the video.
    """
    torch.manual_seed(seed)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=in_channels,
        out_channels=4,
        time_embed_dim=32,
        text_embed_dim=32,
        num_layers=num_layers,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        patch_size_t=patch_size_t,
        patch_bias=patch_size_t is None,
        temporal_compression_ratio=4,
        max_text_seq_length=TEXT_LENGTH,
        use_rotary_positional_embeddings=rotary,
    ).eval()
    return transformer


def tiny_vae(*, seed: int = 0) -> AutoencoderKLCogVideoX:
    """A random CogVideoX autoencoder: 8x in space, 4x in time, 4 latent channels."""
    torch.manual_seed(seed)
    return AutoencoderKLCogVideoX(
        in_channels=3,
        out_channels=3,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    ).eval()


def tiny_cogvideox_pipeline(
    seed: int = 0,
    *,
    num_layers: int = 2,
    rotary: bool = False,
    patch_size_t: int | None = None,
    in_channels: int = 4,
    dtype: torch.dtype = torch.float32,
) -> CogVideoXPipeline:
    """A complete random pipeline: T5 tokenizer and encoder, autoencoder, transformer, DDIM scheduler.

    The transformer's biases and norms are randomised too, so that a test which drops one of them fails.
    """
    transformer = tiny_transformer(
        seed=seed, num_layers=num_layers, rotary=rotary, patch_size_t=patch_size_t, in_channels=in_channels
    )
    _stir(transformer, seed + 1)
    pipe = CogVideoXPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_text_encoder(seed=seed).to(dtype),
        vae=tiny_vae(seed=seed).to(dtype),
        transformer=transformer.to(dtype),
        scheduler=CogVideoXDDIMScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_cogvideox_image_pipeline(seed: int = 0) -> CogVideoXImageToVideoPipeline:
    """A complete random CogVideoX pipeline that animates an image."""
    pipe = CogVideoXImageToVideoPipeline(**tiny_cogvideox_pipeline(seed, rotary=True, in_channels=8).components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _stir(transformer: torch.nn.Module, seed: int) -> None:
    """Randomise biases and norms too, so that a test which drops one of them fails."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def tiny_wan_pipeline(
    seed: int = 0,
    *,
    num_layers: int = 2,
    dtype: torch.dtype = torch.float32,
    expand_timesteps: bool = False,
    boundary_ratio: float | None = None,
) -> WanPipeline:
    """A complete random Wan pipeline: hidden size 64, feed-forward 96, 4 latent channels, flow matching.

    With `expand_timesteps` every token has a timestep of its own, as in Wan 2.2 5B. With a `boundary_ratio` a second
    transformer, of one block less, denoises the timesteps below it, as in Wan 2.2 A14B.
    """
    parts = _wan_parts(seed, dtype, in_channels=4, num_layers=num_layers)
    if boundary_ratio is not None:
        second = _wan_parts(seed + 2, dtype, in_channels=4, num_layers=num_layers - 1)["transformer"]
        parts |= {"transformer_2": second, "boundary_ratio": boundary_ratio}
    pipe = WanPipeline(**parts, expand_timesteps=expand_timesteps)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_wan_image_pipeline(seed: int = 0, *, dtype: torch.dtype = torch.float32) -> WanImageToVideoPipeline:
    """A complete random Wan 2.1 pipeline that animates an image: latent, mask and tokens of CLIP reach the blocks."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    parts = _wan_parts(seed, dtype, in_channels=12, num_layers=2, image_dim=32, added_kv_proj_dim=64)
    pipe = WanImageToVideoPipeline(
        **parts,
        image_encoder=CLIPVisionModel(vision).eval().to(dtype),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _wan_parts(seed: int, dtype: torch.dtype, **config: Any) -> dict[str, Any]:
    """The components that all Wan pipelines have; the transformer keeps in fp32 what its class says."""
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=96,
        rope_max_seq_len=32,
        **config,
    ).eval()
    _stir(transformer, seed + 1)
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()
    encoder = UMT5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    kept = set(transformer._keep_in_fp32_modules or ())
    half = transformer.to(dtype)
    for name, parameter in half.named_parameters():
        if kept & set(name.split(".")):
            parameter.data = parameter.data.float()
    return {
        "tokenizer": tiny_tokenizer(),
        "text_encoder": UMT5EncoderModel(encoder).eval().to(dtype),
        "vae": vae.to(dtype),
        "transformer": half,
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    }


def tiny_hunyuanvideo_pipeline(seed: int = 0, *, dtype: torch.dtype = torch.float32) -> HunyuanVideoPipeline:
    """A complete random HunyuanVideo pipeline: a block with two streams, one with one, hidden size 64."""
    torch.manual_seed(seed)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=2,
        patch_size_t=1,
        text_embed_dim=32,
        pooled_projection_dim=32,
        rope_axes_dim=(4, 6, 6),
    ).eval()
    _stir(transformer, seed + 1)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()
    llama = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    clip = CLIPTextConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        eos_token_id=1,
        bos_token_id=0,
    )
    # The pipeline drops the first 95 tokens, which have to belong to what it writes before a prompt: these are 106.
    words = sorted({word for word in DEFAULT_PROMPT_TEMPLATE["template"].split() if len(word) > 3})
    pipe = HunyuanVideoPipeline(
        text_encoder=LlamaModel(llama).eval().to(dtype),
        tokenizer=tiny_tokenizer(words),
        transformer=transformer.to(dtype),
        vae=vae.to(dtype),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=CLIPTextModel(clip).eval().to(dtype),
        tokenizer_2=tiny_tokenizer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_hunyuanvideo15_pipeline(seed: int = 0, *, dtype: torch.dtype = torch.float32) -> HunyuanVideo15Pipeline:
    """A complete random HunyuanVideo 1.5 pipeline: hidden size 64, 4 latent channels, and a guider for guidance."""
    torch.manual_seed(seed)
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9,  # 4 of the latent, 4 of an image, a mask
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=32,
        text_embed_2_dim=32,
        image_embed_dim=32,
        rope_axes_dim=(4, 6, 6),
    ).eval()
    _stir(transformer, seed + 1)
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        spatial_compression_ratio=8,
    ).eval()
    qwen = Qwen2_5_VLTextConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]},
        bos_token_id=0,
        eos_token_id=1,
    )
    tokenizer = tiny_tokenizer()  # one token a character: what the pipeline drops is the beginning of its own message
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    pipe = HunyuanVideo15Pipeline(
        text_encoder=Qwen2_5_VLTextModel(qwen).eval().to(dtype),
        tokenizer=tokenizer,
        transformer=transformer.to(dtype),
        vae=vae.to(dtype),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=tiny_text_encoder(seed=seed).to(dtype),
        tokenizer_2=ByT5Tokenizer(extra_ids=0),
        guider=ClassifierFreeGuidance(guidance_scale=5.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_ltx_pipeline(seed: int = 0, *, dtype: torch.dtype = torch.float32) -> LTXPipeline:
    """A complete random LTX pipeline: hidden size 64, 8 latent channels, 4x in time and 8x in space, flow matching."""
    torch.manual_seed(seed)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=16,
        cross_attention_dim=64,
        num_layers=2,
        caption_channels=32,
    ).eval()
    _stir(transformer, seed + 1)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=2,
        patch_size_t=1,
    ).eval()
    pipe = LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.to(dtype),
        text_encoder=tiny_text_encoder(seed=seed).to(dtype),
        tokenizer=tiny_tokenizer(),
        transformer=transformer.to(dtype),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_mochi_pipeline(seed: int = 0, *, dtype: torch.dtype = torch.float32) -> MochiPipeline:
    """A complete random Mochi pipeline: video 64 wide and text 32, 12 latent channels, 6x in time, flow matching."""
    torch.manual_seed(seed)
    transformer = MochiTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=2,
        pooled_projection_dim=32,
        in_channels=12,
        text_embed_dim=32,
        time_embed_dim=8,
        max_sequence_length=256,
    ).eval()
    _stir(transformer, seed + 1)
    vae = AutoencoderKLMochi(
        latent_channels=12,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    ).eval()
    pipe = MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=vae.to(dtype),
        text_encoder=tiny_text_encoder(seed=seed).to(dtype),
        tokenizer=tiny_tokenizer(),
        transformer=transformer.to(dtype),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def transformer_inputs(*, seed: int = 0, batch: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random inputs of a tiny transformer (without rotary embeddings), as keyword arguments of its forward."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 3, 4, 2, 2, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch, TEXT_LENGTH, 32, generator=generator).to(dtype),
        "timestep": torch.full((batch,), 7),
    }


@torch.no_grad()
def run_transformer(transformer: torch.nn.Module, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The output of a tiny transformer on `transformer_inputs(seed=seed)`, as float32."""
    inputs = transformer_inputs(seed=seed, dtype=dtype)
    return transformer(**inputs, return_dict=False)[0].float()


@torch.no_grad()
def run_pipeline(pipe: CogVideoXPipeline, *, prompt: str = "a red circle", seed: int = 0, **call: Any) -> torch.Tensor:
    """Frames (or latents with `output_type="latent"`) of one tiny video, float."""
    arguments = {**TINY_CALL, "output_type": "pt", **call}
    return pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), **arguments).frames


def split_input(layer, x):
    """What a packed linear quantizes of an input, and what its low-rank branch adds to the output."""
    quantized, coefficients = transform_input(x, layer.input_tensors())
    return quantized, None if coefficients is None else coefficients @ layer.low_rank_weight.float().t()


def shrunken(name: str) -> SyntheticModel:
    """A synthetic model of the same structure with two blocks a list and 2 heads of 48 channels."""
    model = synthetic_model(name)
    small = {"num_attention_heads": 2, "attention_head_dim": 48}
    small |= {key: size for key, size in (("ffn_dim", 64), ("cross_attention_dim", 96)) if key in model.config}
    small |= {one.argument: 2 for one in model.block_lists}
    lists = tuple(replace(one, count=2) for one in model.block_lists)
    return replace(model, config=dict(model.config) | small, block_lists=lists, tokens=10, text_tokens=6)


class ListedSamples(list):
    """Samples of a block that lie in memory, as distillation takes them."""

    device = "cpu"

    def read(self, index):
        return self[index]

    def to_device(self, sample):
        return sample

    def __getitem__(self, index):
        found = super().__getitem__(index)
        return ListedSamples(found) if isinstance(index, slice) else found
