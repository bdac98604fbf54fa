"""Interface and common code of the embedded models.

9 frames of 32x32 become 3 latent frames of 8x8 with 16 channels (4x in time, 4x in space); a transformer reads them
with patch size 1, so it sees 192 video tokens and 16 text tokens.

Legend of shapes: `B` videos, `F` frames, `f` latent frames, `C` latent channels, `h`, `w` latent height and width, `T`
text tokens, `D` text width.
"""

import string
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, T5Tokenizer

from training.videos import vocabulary

NUM_FRAMES, FRAME_SIZE = 9, 32
LATENT_CHANNELS, LATENT_FRAMES, LATENT_SIZE = 16, 3, 8
TEXT_TOKENS, TEXT_WIDTH = 16, 128
HIDDEN_HEADS, HEAD_DIM, NUM_BLOCKS = 3, 64, 6

TEXT_ENCODER: dict[str, Any] = {
    "d_model": TEXT_WIDTH,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 32,
    "dropout_rate": 0.0,
    "tie_word_embeddings": False,
}
"""A two-layer encoder of width 128, trained together with the transformer: arguments of T5's configurations."""


class EmbeddedArchitecture(ABC):
    """One embedded model: how its parts are built, called and trained.

    Attributes:
        name: Of the embedded model, "shapes-cogvideox".
        title: What the pipeline is, for the training card.
        latents_of: The embedded model whose latents this one has too; None if its autoencoder makes its own.
        starts_from: The embedded model whose weights this one starts from; None for fresh ones.
        guidance_scale: Of the judged videos.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    latents_of: ClassVar[str | None] = None
    starts_from: ClassVar[str | None] = None
    guidance_scale: ClassVar[float]

    @property
    def generation(self) -> dict[str, int | float]:
        """Settings of the judged videos."""
        sizes = {"height": FRAME_SIZE, "width": FRAME_SIZE, "num_frames": NUM_FRAMES}
        return {"num_inference_steps": 20, "guidance_scale": self.guidance_scale, **sizes}

    @abstractmethod
    def build_text_encoder(self, tokenizer: T5Tokenizer) -> PreTrainedModel:
        """The text encoder with fresh weights."""

    @abstractmethod
    def build_vae(self) -> Any:
        """The autoencoder with fresh weights."""

    @abstractmethod
    def build_transformer(self) -> Any:
        """The transformer with fresh weights."""

    @abstractmethod
    def assemble(self, **parts: Any) -> Any:
        """The pipeline of `tokenizer`, `text_encoder`, `vae` and `transformer`, with its scheduler."""

    def latents(self, vae: Any, videos: Tensor) -> Tensor:
        """The latents [B, C, f, h, w] of videos [B, F, 3, H, W] in [0, 1], as the transformer sees them.

        The mean of the posterior; the weights of the autoencoder normalise it.
        """
        return vae.encode(videos.transpose(1, 2) * 2 - 1).latent_dist.mean

    def pooled(self, vae: Any, videos: Tensor) -> dict[str, Tensor]:
        """The training data of the transformer, by name: each [B, C, f, h, w]."""
        return {"latents": self.latents(vae, videos)}

    @abstractmethod
    def decoded(self, vae: Any, latents: Tensor) -> Tensor:
        """The videos [B, 3, F, H, W] of latents [B, C, f, h, w], in [-1, 1] or a little beyond; differentiable."""

    @abstractmethod
    def encode_text(self, text_encoder: Any, tokenizer: T5Tokenizer, texts: list[str], *, length: int) -> Tensor:
        """Text embeddings [B, T, D] as the pipeline makes them, with T = `length`."""

    @abstractmethod
    def noised(self, clean: Tensor, noise: Tensor, fraction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noise latents [B, C, f, h, w] at a fraction [B] in [0, 1) of the way to pure (standard normal) noise.

        Returns the noised latents, the transformer's target for them and the timesteps [B].
        """

    @abstractmethod
    def predict(self, transformer: nn.Module, noised: Tensor, text: Tensor, timesteps: Tensor) -> Tensor:
        """The transformer's output for noised latents [B, C, f, h, w], in their layout."""

    def text_length(self, draw: float) -> int:
        """Padded text length of a training batch, from a number in [0, 1)."""
        return TEXT_TOKENS


def build_tokenizer() -> T5Tokenizer:
    """A unigram tokenizer: one piece a caption word (also capitalised), single characters for the rest."""
    words = vocabulary()
    pieces = [*words, *(word.capitalize() for word in words)]
    characters = string.ascii_letters + string.digits + string.punctuation
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    vocab += [(f"▁{piece}", -1.0) for piece in pieces if len(piece) > 1 or piece in "aA"]
    vocab += [(character, -8.0) for character in characters]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=TEXT_TOKENS)


def build_pipeline(architecture: EmbeddedArchitecture, *, seed: int) -> Any:
    """The whole pipeline of an embedded model with freshly initialised weights, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        return architecture.assemble(
            tokenizer=tokenizer,
            text_encoder=architecture.build_text_encoder(tokenizer).eval(),
            vae=architecture.build_vae().eval(),
            transformer=architecture.build_transformer().eval(),
        )
