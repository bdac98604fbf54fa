"""The parts of ``shapes-cogvideox``: a complete CogVideoX pipeline, small enough to train and to run on a CPU.

9 frames of 32x32 become 3 latent frames of 8x8 with 16 channels (4x in time, 4x in space); the transformer reads
them with patch size 1, so it sees 192 video tokens and 16 text tokens.
"""

import string

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from s2q.shapes.scenes import vocabulary

NUM_FRAMES, FRAME_SIZE = 9, 32
LATENT_CHANNELS, LATENT_FRAMES, LATENT_SIZE = 16, 3, 8
TEXT_TOKENS, TEXT_WIDTH = 16, 128
HIDDEN_HEADS, HEAD_DIM, NUM_BLOCKS = 3, 64, 6


def build_tokenizer() -> T5Tokenizer:
    """A unigram tokenizer: one piece a caption word (also capitalised), single characters for the rest."""
    words = vocabulary()
    pieces = [*words, *(word.capitalize() for word in words)]
    characters = string.ascii_letters + string.digits + string.punctuation
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    vocab += [(f"▁{piece}", -1.0) for piece in pieces if len(piece) > 1 or piece in "aA"]
    vocab += [(character, -8.0) for character in characters]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=TEXT_TOKENS)


def build_text_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """A two-layer T5 encoder of width 128, trained together with the transformer."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config)


def build_vae() -> AutoencoderKLCogVideoX:
    """A three-level causal 3D autoencoder, 1.9 million parameters."""
    return AutoencoderKLCogVideoX(
        in_channels=3,
        out_channels=3,
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(16, 32, 64),
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        temporal_compression_ratio=4,
        sample_height=FRAME_SIZE,
        sample_width=FRAME_SIZE,
        scaling_factor=1.0,
    )


def build_transformer() -> CogVideoXTransformer3DModel:
    """Six blocks of width 192 (3 heads of 64), sine-cosine positions: CogVideoX-2B in small."""
    return CogVideoXTransformer3DModel(
        num_attention_heads=HIDDEN_HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        time_embed_dim=64,
        text_embed_dim=TEXT_WIDTH,
        num_layers=NUM_BLOCKS,
        sample_width=LATENT_SIZE,
        sample_height=LATENT_SIZE,
        sample_frames=NUM_FRAMES,
        patch_size=1,
        temporal_compression_ratio=4,
        max_text_seq_length=TEXT_TOKENS,
    )


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


def build_pipeline(*, seed: int) -> CogVideoXPipeline:
    """The whole pipeline with freshly initialised weights, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        pipeline = CogVideoXPipeline(
            tokenizer=tokenizer,
            text_encoder=build_text_encoder(tokenizer).eval(),
            vae=build_vae().eval(),
            transformer=build_transformer().eval(),
            scheduler=build_scheduler(),
        )
    return pipeline
