"""``shapes-cogvideox``: a complete CogVideoX pipeline, small enough to train and to run on a CPU."""

from typing import Any

from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from training import architecture as shapes
from training.architecture import EmbeddedArchitecture


class ShapesCogVideoX(EmbeddedArchitecture):
    """CogVideoX-2B in small: joint attention over text and video, sine-cosine positions, v-prediction."""

    name = "shapes-cogvideox"
    title = "A complete CogVideoX pipeline (tokenizer, T5 encoder, 3D autoencoder, 6-block transformer, DDIM scheduler)"
    guidance_scale = 6.0

    def __init__(self) -> None:
        self.scheduler = build_scheduler()

    def build_text_encoder(self, tokenizer: T5Tokenizer) -> T5EncoderModel:
        """A two-layer T5 encoder."""
        return T5EncoderModel(T5Config(vocab_size=len(tokenizer), **shapes.TEXT_ENCODER))

    def build_vae(self) -> AutoencoderKLCogVideoX:
        """A three-level causal 3D autoencoder, 1.9 million parameters."""
        return AutoencoderKLCogVideoX(
            in_channels=3,
            out_channels=3,
            down_block_types=("CogVideoXDownBlock3D",) * 3,
            up_block_types=("CogVideoXUpBlock3D",) * 3,
            block_out_channels=(16, 32, 64),
            latent_channels=shapes.LATENT_CHANNELS,
            layers_per_block=1,
            norm_num_groups=8,
            temporal_compression_ratio=4,
            sample_height=shapes.FRAME_SIZE,
            sample_width=shapes.FRAME_SIZE,
            scaling_factor=1.0,
        )

    def build_transformer(self) -> CogVideoXTransformer3DModel:
        """Six blocks of width 192 (3 heads of 64), sine-cosine positions."""
        return CogVideoXTransformer3DModel(
            num_attention_heads=shapes.HIDDEN_HEADS,
            attention_head_dim=shapes.HEAD_DIM,
            in_channels=shapes.LATENT_CHANNELS,
            out_channels=shapes.LATENT_CHANNELS,
            time_embed_dim=64,
            text_embed_dim=shapes.TEXT_WIDTH,
            num_layers=shapes.NUM_BLOCKS,
            sample_width=shapes.LATENT_SIZE,
            sample_height=shapes.LATENT_SIZE,
            sample_frames=shapes.NUM_FRAMES,
            patch_size=1,
            temporal_compression_ratio=4,
            max_text_seq_length=shapes.TEXT_TOKENS,
        )

    def assemble(self, **parts: Any) -> CogVideoXPipeline:
        """The pipeline with a DDIM scheduler."""
        return CogVideoXPipeline(scheduler=build_scheduler(), **parts)

    def decoded(self, vae: AutoencoderKLCogVideoX, latents: Tensor) -> Tensor:
        """The decoded video of latents."""
        return vae.decode(latents).sample

    def encode_text(
        self, text_encoder: T5EncoderModel, tokenizer: T5Tokenizer, texts: list[str], *, length: int
    ) -> Tensor:
        """The encoder's last states, padding included: CogVideoX masks nothing."""
        encoded = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return text_encoder(encoded.input_ids.to(text_encoder.device)).last_hidden_state

    def noised(self, clean: Tensor, noise: Tensor, fraction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Variance-preserving noise, the velocity as target."""
        steps = self.scheduler.config.num_train_timesteps
        timesteps = (fraction * steps).long().clamp_max(steps - 1)
        velocity = self.scheduler.get_velocity(clean, noise, timesteps)
        return self.scheduler.add_noise(clean, noise, timesteps), velocity, timesteps

    def predict(self, transformer: nn.Module, noised: Tensor, text: Tensor, timesteps: Tensor) -> Tensor:
        """CogVideoX takes frames first."""
        return transformer(noised.transpose(1, 2), text, timesteps, return_dict=False)[0].transpose(1, 2)


def build_scheduler() -> CogVideoXDDIMScheduler:
    """CogVideoX-2B's noise schedule (v-prediction, zero terminal SNR, trailing steps), its SNR not shifted."""
    return CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
