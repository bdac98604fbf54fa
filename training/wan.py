"""``shapes-wan``: a complete Wan pipeline, small enough to train and to run on a CPU."""

from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from training import architecture as shapes
from training.architecture import EmbeddedArchitecture

NUM_TRAIN_TIMESTEPS = 1000
PIPELINE_TEXT_TOKENS = 512
"""Default text padding of `WanPipeline`."""
PIPELINE_TEXT_FRACTION = 0.1
"""Share of the training batches with texts of that length: the attention to them has no mask, so padding matters."""


class ShapesWan(EmbeddedArchitecture):
    """Wan 2.1 in small: self-attention with rotary positions in 3D, cross-attention to the text, flow matching."""

    name = "shapes-wan"
    title = "A complete Wan pipeline (tokenizer, UMT5 encoder, 3D autoencoder, 6-block transformer, UniPC scheduler)"
    latents_of = "shapes-cogvideox"
    guidance_scale = 5.0

    def build_text_encoder(self, tokenizer: T5Tokenizer) -> UMT5EncoderModel:
        """A two-layer UMT5 encoder."""
        return UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **shapes.TEXT_ENCODER))

    def build_vae(self) -> AutoencoderKLWan:
        """A three-level causal 3D autoencoder, 1.9 million parameters."""
        return AutoencoderKLWan(
            base_dim=16,
            z_dim=shapes.LATENT_CHANNELS,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            latents_mean=[0.0] * shapes.LATENT_CHANNELS,
            latents_std=[1.0] * shapes.LATENT_CHANNELS,
            scale_factor_temporal=4,
            scale_factor_spatial=4,
        )

    def build_transformer(self) -> WanTransformer3DModel:
        """Six blocks of width 192 (3 heads of 64)."""
        return WanTransformer3DModel(
            patch_size=(1, 1, 1),
            num_attention_heads=shapes.HIDDEN_HEADS,
            attention_head_dim=shapes.HEAD_DIM,
            in_channels=shapes.LATENT_CHANNELS,
            out_channels=shapes.LATENT_CHANNELS,
            text_dim=shapes.TEXT_WIDTH,
            freq_dim=64,
            ffn_dim=4 * shapes.HIDDEN_HEADS * shapes.HEAD_DIM,
            num_layers=shapes.NUM_BLOCKS,
            rope_max_seq_len=32,
        )

    def assemble(self, **parts: Any) -> Any:
        """The pipeline with Wan's own scheduler, its noise levels not shifted."""
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=1.0,
            num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        )
        return self.pipeline(scheduler, **parts)

    def pipeline(self, scheduler: UniPCMultistepScheduler, **parts: Any) -> Any:
        """The pipeline of a scheduler and the other parts."""
        return WanPipeline(scheduler=scheduler, **parts)

    def decoded(self, vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
        """Decoded video before the autoencoder's clamp, which would stop the gradient."""
        pieces: list[Tensor] = []
        handle = vae.decoder.register_forward_hook(lambda _module, _args, output: pieces.append(output))
        try:
            vae.decode(latents)
        finally:
            handle.remove()
        return torch.cat(pieces, dim=2)

    def encode_text(
        self, text_encoder: UMT5EncoderModel, tokenizer: T5Tokenizer, texts: list[str], *, length: int
    ) -> Tensor:
        """The encoder's last states, zeros behind the end of each text; padding is masked in the encoder alone."""
        encoded = tokenizer(
            texts, padding="max_length", max_length=shapes.TEXT_TOKENS, truncation=True, return_tensors="pt"
        ).to(text_encoder.device)
        states = text_encoder(encoded.input_ids, encoded.attention_mask).last_hidden_state
        states = states * encoded.attention_mask[..., None]
        return nn.functional.pad(states, (0, 0, 0, length - shapes.TEXT_TOKENS))

    def text_length(self, draw: float) -> int:
        """Mostly 16 tokens, now and then what the pipeline pads to by itself."""
        return PIPELINE_TEXT_TOKENS if draw < PIPELINE_TEXT_FRACTION else shapes.TEXT_TOKENS

    def noised(self, clean: Tensor, noise: Tensor, fraction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The straight line from data to noise, its direction as target."""
        level = fraction.view(-1, 1, 1, 1, 1)
        return clean + level * (noise - clean), noise - clean, fraction * NUM_TRAIN_TIMESTEPS

    def predict(self, transformer: nn.Module, noised: Tensor, text: Tensor, timesteps: Tensor) -> Tensor:
        """Wan takes channels first, as the latents are."""
        return transformer(noised, timesteps, text, return_dict=False)[0]
