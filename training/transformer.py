"""The transformer's trainer: velocity prediction on cached latents, text encoder and guidance dropout included."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, T5Tokenizer

from s2q.common.seeds import derive_seed
from training.architecture import EmbeddedArchitecture, build_tokenizer
from training.videos import sample_training_batch

CAPTION_DROPOUT = 0.1
CAPITALISED_FRACTION = 0.2
OBJECT_WEIGHT = 6.0


DrawBatch = Callable[..., tuple[Tensor, list[str]]]
"""Draws a number of videos ``[B, F, 3, H, W]`` in ``[0, 1]`` and their captions, from a ``generator``."""


@torch.no_grad()
def encode_pool(
    architecture: EmbeddedArchitecture,
    vae: Any,
    path: Path,
    *,
    count: int,
    seed: int,
    batch_size: int = 64,
    draw: DrawBatch = sample_training_batch,
) -> None:
    """Encode ``count`` training scenes once: ``[count, C, f, h, w]`` float16, and the captions beside it as JSON.

    Where a model has conditions, they are in the same file.
    """
    device = next(vae.parameters()).device
    encoded: dict[str, list[Tensor]] = {}
    captions: list[str] = []
    for start in range(0, count, batch_size):
        generator = torch.Generator().manual_seed(derive_seed(seed, "pool", start))
        videos, texts = draw(min(batch_size, count - start), generator=generator)
        with torch.autocast(device.type, torch.bfloat16):
            for name, tensor in architecture.pooled(vae, videos.to(device)).items():
                encoded.setdefault(name, []).append(tensor.to("cpu", torch.float16))
        captions += texts
    save_file({name: torch.cat(tensors).contiguous() for name, tensors in encoded.items()}, path)
    path.with_suffix(".json").write_text(json.dumps(captions))


def object_weights(clean: Tensor) -> Tensor:
    """Loss weights ``[B, 1, f, h, w]`` of clean latents ``[B, C, f, h, w]``: largest on the object, mean 1.

    The background fills most of a frame and is learned at once, so an unweighted loss says little about the shape. A
    position counts as object by its squared distance from the frame's median latent, relative to the largest one.
    """
    median = clean.flatten(3).median(dim=-1).values[..., None, None]
    distance = (clean - median).square().sum(dim=1, keepdim=True)
    weights = 1 + (OBJECT_WEIGHT - 1) * distance / distance.amax(dim=(3, 4), keepdim=True).clamp_min(1e-6)
    return weights / weights.mean()


class TransformerTask:
    """Predict the velocity of noised latents from their caption; the squared error is weighted towards the object.

    A tenth of the captions is replaced by the empty one, for classifier-free guidance; a fifth begins with a capital
    and ends with a full stop, so that both spellings work.
    """

    def __init__(self, architecture: EmbeddedArchitecture, *, pool: Path, seed: int = 0) -> None:
        self.architecture = architecture
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.tokenizer, self.text_encoder, self.transformer = self.build()
        self.modules = nn.ModuleDict({"text_encoder": self.text_encoder, "transformer": self.transformer})
        self.clean_latents = load_file(pool)["latents"]
        self.captions: list[str] = json.loads(pool.with_suffix(".json").read_text())

    def build(self) -> tuple[T5Tokenizer, PreTrainedModel, Any]:
        """The tokenizer, the text encoder and the transformer, with fresh weights."""
        tokenizer = build_tokenizer()
        return tokenizer, self.architecture.build_text_encoder(tokenizer), self.architecture.build_transformer()

    def _texts(self, picks: list[int], generator: torch.Generator) -> list[str]:
        draws = torch.rand(len(picks), 2, generator=generator).tolist()
        texts = []
        for pick, (drop, capital) in zip(picks, draws, strict=True):
            text = self.captions[pick]
            if drop < CAPTION_DROPOUT:
                text = ""
            elif capital < CAPITALISED_FRACTION:
                text = text[0].upper() + text[1:] + "."
            texts.append(text)
        return texts

    def transformer_input(self, noised: Tensor, picks: Tensor) -> Tensor:
        """The input of the transformer for noised latents [B, C, f, h, w] of the scenes `picks` [B] of the pool."""
        return noised

    def loss(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Loss of a fresh batch; timesteps are stratified over the batch, which steadies the gradient."""
        architecture = self.architecture
        device = next(self.transformer.parameters()).device
        picks = torch.randint(len(self.captions), (batch_size,), generator=generator)
        clean = self.clean_latents[picks].float()
        noise = torch.randn(clean.shape, generator=generator)
        fraction = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size
        noised, target, timesteps = (tensor.to(device) for tensor in architecture.noised(clean, noise, fraction))
        inputs = self.transformer_input(noised, picks)
        texts = self._texts(picks.tolist(), generator)
        length = architecture.text_length(float(torch.rand((), generator=generator)))
        with torch.autocast(device.type, torch.bfloat16):
            text = architecture.encode_text(self.text_encoder, self.tokenizer, texts, length=length)
            output = architecture.predict(self.transformer, inputs, text, timesteps)
        error = (output.float() - target).square()
        return (error * object_weights(clean).to(device)).mean(), {"unweighted": float(error.detach().mean())}
