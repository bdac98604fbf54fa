"""The tiny random pipelines that tests and golden figures use: one entry a family; a new family is a new entry.

Hidden size 64 (4 heads of 16) everywhere; 9 frames of 16 x 16 pixels are a few dozen tokens.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any

import diffusers as d
import torch
import transformers as t
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

from s2q.pipelines.minimax_h3 import MiniMaxH3Pipeline

TEXT_LENGTH = 16
"""`max_text_seq_length` of the tiny CogVideoX transformers, in tokens."""

_HEADS = {"num_attention_heads": 4, "attention_head_dim": 16}


@dataclass(frozen=True, kw_only=True)
class TinyFamily:
    """The parts of one tiny pipeline.

    Attributes:
        pipeline: Class of the pipeline.
        transformer: Class of the transformer.
        config: Of the transformer.
        vae: Builds the autoencoder.
        scheduler: Builds the scheduler.
        texts: Builds tokenizers, encoders and other components by name, in the order of their random weights.
        options: Of the pipeline, beside its components.
        fresh_vae: Whether the autoencoder is drawn from the seed, not after the transformer.
    """

    pipeline: type[d.DiffusionPipeline]
    transformer: type[torch.nn.Module]
    config: Mapping[str, Any]
    vae: Callable[[], torch.nn.Module]
    scheduler: Callable[[], Any]
    texts: Callable[[int], dict[str, Any]]
    options: Mapping[str, Any] = field(default_factory=dict)
    fresh_vae: bool = False


def tokenizer(words: Sequence[str] = ()) -> t.T5Tokenizer:
    """A T5 tokenizer by character, except for the words given; ids 0, 1, 2 are padding, end of sequence, unknown."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(character, -3.0) for character in string.ascii_letters + string.digits + string.punctuation]
    pieces += [(f"▁{word}", -1.0) for word in words]
    return t.T5Tokenizer(vocab=pieces, extra_ids=0)


def text_encoder(seed: int) -> t.T5EncoderModel:
    """A random two-layer T5 encoder of width 32."""
    torch.manual_seed(seed)
    config = t.T5Config(
        vocab_size=128,
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8,
        tie_word_embeddings=False,
    )
    return t.T5EncoderModel(config)


def _t5(seed: int) -> dict[str, Any]:
    return {"tokenizer": tokenizer(), "text_encoder": text_encoder(seed)}


def _umt5(_seed: int) -> dict[str, Any]:
    config = t.UMT5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    return {"tokenizer": tokenizer(), "text_encoder": t.UMT5EncoderModel(config)}


def _umt5_and_clip_vision(seed: int) -> dict[str, Any]:
    vision = t.CLIPVisionConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    return {
        **_umt5(seed),
        "image_encoder": t.CLIPVisionModel(vision),
        "image_processor": t.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
    }


def _qwen_and_sound(seed: int) -> dict[str, Any]:
    """The pipeline reads the hidden state of layer 50, of a model that has more."""
    torch.manual_seed(seed)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = {"vocab_size": 128, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 52, **heads}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = t.Qwen3VLConfig(
        text_config=text | {"rope_parameters": rope}, vision_config=vision | {"deepstack_visual_indexes": [0]}
    )
    with torch.no_grad():  # weight_norm computes its weights here
        audio_vae = d.AutoencoderKLMiniMaxH3Audio(
            encoder_dim=2,
            encoder_rates=(2, 4, 4, 5, 5),
            latent_dim=16,
            latent_channels=4,
            num_attention_heads=2,
            decoder_dim=128,
            decoder_rates=(5, 5, 2, 2, 2, 2, 2),
            resblock_kernel_sizes=(3,),
            resblock_dilation_sizes=((1, 3, 5),),
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        )
    return {
        "tokenizer": tokenizer(),
        "text_encoder": t.Qwen3VLForConditionalGeneration(config),
        "audio_scheduler": d.MiniMaxH3Scheduler(shift=3.0),
        "audio_vae": audio_vae,
    }


def _llama_and_clip(_seed: int) -> dict[str, Any]:
    size = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4}
    llama = t.LlamaConfig(**size, num_hidden_layers=3, max_position_embeddings=512)
    clip = t.CLIPTextConfig(**size, num_hidden_layers=2, projection_dim=32, eos_token_id=1, bos_token_id=0)
    # The pipeline drops the first 95 tokens, which have to belong to what it writes before a prompt: these are 106.
    words = sorted({word for word in DEFAULT_PROMPT_TEMPLATE["template"].split() if len(word) > 3})
    return {
        "tokenizer": tokenizer(words),
        "text_encoder": t.LlamaModel(llama),
        "tokenizer_2": tokenizer(),
        "text_encoder_2": t.CLIPTextModel(clip),
    }


def _qwen_byt5_and_siglip(seed: int) -> dict[str, Any]:
    vision = t.SiglipVisionConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    return {
        **_qwen_and_byt5(seed),
        "image_encoder": t.SiglipVisionModel(vision),
        "feature_extractor": t.SiglipImageProcessor(size={"height": 16, "width": 16}),
    }


def _qwen_and_byt5(seed: int) -> dict[str, Any]:
    qwen = t.Qwen2_5_VLTextConfig(
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
    messages = tokenizer()  # one token a character: what the pipeline drops is the beginning of its own message
    messages.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return {
        "tokenizer": messages,
        "text_encoder": t.Qwen2_5_VLTextModel(qwen),
        "tokenizer_2": t.ByT5Tokenizer(extra_ids=0),
        "text_encoder_2": text_encoder(seed),
        "guider": ClassifierFreeGuidance(guidance_scale=5.0),
    }


def _qwen_and_clip(seed: int) -> dict[str, Any]:
    texts, parts = _llama_and_clip(seed), dict.fromkeys(("transformer", "vae", "text_encoder", "text_encoder_2"))
    others = dict.fromkeys(("tokenizer", "tokenizer_2", "scheduler"))
    # The pipeline drops the first 128 tokens, which have to belong to what it writes before a prompt.
    template = d.Kandinsky5T2VPipeline(**parts, **others).prompt_template
    return {
        "tokenizer": tokenizer(sorted({word for word in template.split() if word.isalpha()})),
        "text_encoder": _qwen_and_byt5(seed)["text_encoder"],
        "tokenizer_2": texts["tokenizer_2"],
        "text_encoder_2": texts["text_encoder_2"],
    }


_GEMMA = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
}


def _gemma(_seed: int) -> dict[str, Any]:
    # SANA-Video writes an instruction of 1,164 characters before a prompt: a token a word is a third of the time.
    instruction = signature(d.SanaVideoPipeline.__call__).parameters["complex_human_instruction"].default
    words = sorted({word for word in " ".join(instruction).split() if word.isalpha() and len(word) > 2})
    gemma = t.Gemma2Config(**_GEMMA | {"vocab_size": 256})
    return {"tokenizer": tokenizer(words), "text_encoder": t.Gemma2Model(gemma)}


def _gemma_and_sound(_seed: int) -> dict[str, Any]:
    text = t.Gemma3TextConfig(**_GEMMA)
    vision = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 4}
    gemma = t.Gemma3Config(text_config=text, vision_config=vision | {"image_size": 16, "patch_size": 8})
    connector = {"num_attention_heads": 4, "num_layers": 1, "num_learnable_registers": 8}
    return {
        "tokenizer": tokenizer(),
        "text_encoder": t.Gemma3ForConditionalGeneration(gemma),
        "connectors": LTX2TextConnectors(
            caption_channels=32,
            text_proj_in_factor=3,
            **{f"{side}_connector_{key}": value for side in ("video", "audio") for key, value in connector.items()},
            video_connector_attention_head_dim=16,
            audio_connector_attention_head_dim=8,
            connector_rope_base_seq_len=32,
            rope_type="split",
            per_modality_projections=True,
            video_hidden_dim=64,
            audio_hidden_dim=32,
            proj_bias=True,
        ),
        "audio_vae": d.AutoencoderKLLTX2Audio(  # 4x in time, 4x in frequency
            base_channels=8, num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=16
        ),
        "vocoder": LTX2Vocoder(
            in_channels=32,
            hidden_channels=8,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3, 5]],
        ),
    }


_COGVIDEOX = TinyFamily(
    pipeline=d.CogVideoXPipeline,
    transformer=d.CogVideoXTransformer3DModel,
    config=_HEADS
    | {
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 32,
        "text_embed_dim": 32,
        "num_layers": 2,
        "sample_width": 2,
        "sample_height": 2,
        "sample_frames": 9,
        "patch_size": 2,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": TEXT_LENGTH,
    },
    vae=lambda: d.AutoencoderKLCogVideoX(  # 8x in space, 4x in time, 4 latent channels
        in_channels=3,
        out_channels=3,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    ),
    scheduler=d.CogVideoXDDIMScheduler,
    texts=_t5,
    fresh_vae=True,
)
_ROTARY = replace(_COGVIDEOX, config=_COGVIDEOX.config | {"use_rotary_positional_embeddings": True})

_WAN = TinyFamily(
    pipeline=d.WanPipeline,
    transformer=d.WanTransformer3DModel,
    config=_HEADS
    | {
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 96,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    },
    vae=lambda: d.AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ),
    scheduler=lambda: d.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
    texts=_umt5,
)

FAMILIES = {
    "cogvideox": _COGVIDEOX,
    "cogvideox rotary": _ROTARY,
    "cogvideox 1.5": replace(_ROTARY, config=_ROTARY.config | {"patch_size_t": 2, "patch_bias": False}),
    "cogvideox image": replace(
        _ROTARY, pipeline=d.CogVideoXImageToVideoPipeline, config=_ROTARY.config | {"in_channels": 8}
    ),
    "hunyuanvideo": TinyFamily(
        pipeline=d.HunyuanVideoPipeline,
        transformer=d.HunyuanVideoTransformer3DModel,
        config=_HEADS  # a block with two streams, one with one
        | {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "mlp_ratio": 2.0,
            "patch_size": 2,
            "patch_size_t": 1,
            "text_embed_dim": 32,
            "pooled_projection_dim": 32,
            "rope_axes_dim": (4, 6, 6),
        },
        vae=lambda: d.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        ),
        scheduler=lambda: d.FlowMatchEulerDiscreteScheduler(shift=7.0),
        texts=_llama_and_clip,
    ),
    "hunyuanvideo 1.5": TinyFamily(
        pipeline=d.HunyuanVideo15Pipeline,
        transformer=d.HunyuanVideo15Transformer3DModel,
        config=_HEADS
        | {
            "in_channels": 9,  # 4 of the latent, 4 of an image, a mask
            "out_channels": 4,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "mlp_ratio": 2.0,
            "text_embed_dim": 32,
            "text_embed_2_dim": 32,
            "image_embed_dim": 32,
            "rope_axes_dim": (4, 6, 6),
        },
        vae=lambda: d.AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, spatial_compression_ratio=8
        ),
        scheduler=lambda: d.FlowMatchEulerDiscreteScheduler(shift=5.0),
        texts=_qwen_and_byt5,
    ),
    "kandinsky5": TinyFamily(
        pipeline=d.Kandinsky5T2VPipeline,
        transformer=d.Kandinsky5Transformer3DModel,
        config={
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 32,
            "in_text_dim2": 32,
            "time_dim": 32,
            "model_dim": 64,
            "ff_dim": 96,
            "num_text_blocks": 1,
            "num_layers": 2,  # of `num_visual_blocks`
            "axes_dims": (4, 6, 6),
            "visual_cond": True,
        },
        vae=lambda: d.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        ),
        scheduler=lambda: d.FlowMatchEulerDiscreteScheduler(shift=5.0),
        texts=_qwen_and_clip,
    ),
    "ltx": TinyFamily(
        pipeline=d.LTXPipeline,
        transformer=d.LTXVideoTransformer3DModel,
        config=_HEADS
        | {"in_channels": 8, "out_channels": 8, "cross_attention_dim": 64, "num_layers": 2, "caption_channels": 32},
        vae=lambda: d.AutoencoderKLLTXVideo(  # 4x in time, 8x in space
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            patch_size=2,
            patch_size_t=1,
        ),
        scheduler=d.FlowMatchEulerDiscreteScheduler,
        texts=_t5,
    ),
    "mochi": TinyFamily(
        pipeline=d.MochiPipeline,
        transformer=d.MochiTransformer3DModel,
        config=_HEADS  # video 64 wide, text 32
        | {
            "num_layers": 2,
            "pooled_projection_dim": 32,
            "in_channels": 12,
            "text_embed_dim": 32,
            "time_embed_dim": 8,
            "max_sequence_length": 256,
        },
        vae=lambda: d.AutoencoderKLMochi(  # 6x in time
            latent_channels=12,
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
        ),
        scheduler=lambda: d.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        texts=_t5,
    ),
    "wan": _WAN,
    # Every token has a timestep of its own.
    "wan 2.2 5b": replace(_WAN, options={"expand_timesteps": True}),
    # A second transformer, of one block less, denoises the timesteps below the boundary.
    "wan 2.2 a14b": replace(_WAN, options={"boundary_ratio": 0.9}),
    "ltx-2": TinyFamily(  # as 2.3: gates of the heads, modulated text; video 64 wide, sound 32
        pipeline=d.LTX2Pipeline,
        transformer=d.LTX2VideoTransformer3DModel,
        config=_HEADS
        | {
            "in_channels": 8,
            "out_channels": 8,
            "cross_attention_dim": 64,
            "vae_scale_factors": (4, 8, 8),
            "gated_attn": True,
            "cross_attn_mod": True,
            "audio_in_channels": 8,  # 2 of the latent, 4 of its frequencies
            "audio_out_channels": 8,
            "audio_num_attention_heads": 4,
            "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 32,
            "audio_gated_attn": True,
            "audio_cross_attn_mod": True,
            "num_layers": 2,
            "rope_type": "split",
            "use_prompt_embeddings": False,
            "perturbed_attn": True,
        },
        vae=lambda: d.AutoencoderKLLTX2Video(  # 4x in time, 8x in space
            latent_channels=8,
            block_out_channels=(8, 8),
            down_block_types=("LTX2VideoDownBlock3D",) * 2,
            decoder_block_out_channels=(8, 8),
            layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            spatio_temporal_scaling=(True, True),
            decoder_spatio_temporal_scaling=(True, True),
            decoder_inject_noise=(False, False, False),
            downsample_type=("spatiotemporal", "spatiotemporal"),
            upsample_type=("spatiotemporal", "spatiotemporal"),
            upsample_residual=(False, False),
            upsample_factor=(1, 1),
            patch_size=2,
            spatial_compression_ratio=8,
            temporal_compression_ratio=4,
        ),
        scheduler=d.FlowMatchEulerDiscreteScheduler,
        texts=_gemma_and_sound,
    ),
    "minimax-h3": TinyFamily(  # 37 latent frames, the least, of 2 x 2
        pipeline=MiniMaxH3Pipeline,
        transformer=d.MiniMaxH3Transformer3DModel,
        config=_HEADS
        | {
            "hidden_size": 64,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "ffn_dim": 96,
            "in_channels": 4,
            "audio_in_channels": 4,
            "text_dim": 16,
            "freq_dim": 32,
            "time_embed_hidden_dim": 64,
            "time_embed_dim": 32,
            "rope_freq_dim": 2,
        },
        vae=lambda: d.AutoencoderKLMiniMaxH3(
            latent_channels=4,
            block_out_channels=(8,) * 5,
            layers_per_block=1,
            norm_num_groups=2,
            decoder_num_layers=1,
            decoder_num_attention_heads=2,
            decoder_attention_head_dim=16,
            decoder_num_register_tokens=1,
            latents_mean=(0.0,) * 4,
            latents_std=(1.0,) * 4,
        ),
        scheduler=d.MiniMaxH3Scheduler,
        texts=_qwen_and_sound,
    ),
    "sana-video": replace(
        _WAN,
        pipeline=d.SanaVideoPipeline,
        transformer=d.SanaVideoTransformer3DModel,
        config=_HEADS
        | {
            "in_channels": 4,
            "out_channels": 4,
            "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 64,
            "caption_channels": 32,
            "mlp_ratio": 1.5,
            "num_layers": 2,
            "rope_max_seq_len": 32,
        },
        scheduler=lambda: d.FlowMatchEulerDiscreteScheduler(shift=8.0),
        texts=_gemma,
    ),
    "skyreels-v2": replace(
        _WAN,
        pipeline=d.SkyReelsV2Pipeline,
        transformer=d.SkyReelsV2Transformer3DModel,
        scheduler=lambda: d.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
        ),
    ),
    "wan-vace": replace(
        _WAN,
        pipeline=d.WanVACEPipeline,
        transformer=d.WanVACETransformer3DModel,
        config=_WAN.config | {"vace_layers": [0, 1], "vace_in_channels": 72},  # 8 of two latents, a mask of 8 x 8
    ),
    # Latent, mask and tokens of CLIP reach the blocks.
    "wan image": replace(
        _WAN,
        pipeline=d.WanImageToVideoPipeline,
        config=_WAN.config | {"in_channels": 12, "image_dim": 32, "added_kv_proj_dim": 64},
        texts=_umt5_and_clip_vision,
    ),
}
# Channels of an image and of a mask behind those of the latent, no tokens of an image.
_WAN_IMAGE = replace(_WAN, pipeline=d.WanImageToVideoPipeline, config=_WAN.config | {"in_channels": 12})
_HUNYUAN15 = FAMILIES["hunyuanvideo 1.5"]
FAMILIES |= {
    "hunyuanvideo 1.5 image": replace(
        _HUNYUAN15,
        pipeline=d.HunyuanVideo15ImageToVideoPipeline,
        config=_HUNYUAN15.config | {"target_size": 64, "task_type": "i2v"},
        texts=_qwen_byt5_and_siglip,
    ),
    "kandinsky5 image": replace(FAMILIES["kandinsky5"], pipeline=d.Kandinsky5I2VPipeline),
    "ltx image": replace(FAMILIES["ltx"], pipeline=d.LTXImageToVideoPipeline),
    "ltx-2 image": replace(FAMILIES["ltx-2"], pipeline=d.LTX2ImageToVideoPipeline),
    "sana-video image": replace(FAMILIES["sana-video"], pipeline=d.SanaImageToVideoPipeline),
    # The image is the first latent frame, whose tokens have the timestep 0.
    "wan 2.2 5b image": replace(_WAN, pipeline=d.WanImageToVideoPipeline, options={"expand_timesteps": True}),
    "wan 2.2 a14b image": replace(_WAN_IMAGE, options={"boundary_ratio": 0.9}),
    # Videos of poses and of a face beside the image, attention to the face's motion behind each block.
    "wan-animate image": replace(
        FAMILIES["wan image"],
        pipeline=d.WanAnimatePipeline,
        transformer=d.WanAnimateTransformer3DModel,
        config=FAMILIES["wan image"].config
        | {
            "latent_channels": 4,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 1,
        },
    ),
}
IMAGE_TO_VIDEO = tuple(name for name in FAMILIES if name.endswith("image"))
TEXT_TO_VIDEO = tuple(name for name in FAMILIES if name not in IMAGE_TO_VIDEO)
