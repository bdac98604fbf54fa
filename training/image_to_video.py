"""``shapes-wan-i2v``: `shapes-wan` as an image-to-video model, fine-tuned the way such models are made.

As in Wan 2.2, there is no image encoder: the transformer reads noise, a mask and the latents of the first frame, 16 + 4
+ 16 channels. It starts from the weights of `shapes-wan`, with zeros for the new channels, and only it is trained.

Legend of shapes: `B` videos, `C` latent channels, `f` latent frames, `h`, `w` latent height and width.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor

from s2q.shapes.embedded import embedded_pipeline
from training import architecture as shapes
from training.transformer import TransformerTask
from training.wan import ShapesWan

MASK_CHANNELS = 4
"""Frames per latent frame: the mask has a channel for each."""


class ShapesWanImageToVideo(ShapesWan):
    """Wan 2.2's image-to-video model in small, with one transformer."""

    name = "shapes-wan-i2v"
    title = (
        "A complete Wan image-to-video pipeline (tokenizer, UMT5 encoder, 3D autoencoder, 6-block transformer, UniPC "
        "scheduler)"
    )
    latents_of = None
    starts_from = "shapes-wan"
    guidance_scale = 3.0

    def build_transformer(self) -> WanTransformer3DModel:
        """The transformer of `shapes-wan` with the channels of the condition."""
        config = dict(super().build_transformer().config)
        config["in_channels"] = 2 * shapes.LATENT_CHANNELS + MASK_CHANNELS
        return WanTransformer3DModel.from_config(config)

    def pipeline(self, scheduler: UniPCMultistepScheduler, **parts: Any) -> WanImageToVideoPipeline:
        """The pipeline without an image encoder."""
        return WanImageToVideoPipeline(scheduler=scheduler, image_encoder=None, image_processor=None, **parts)

    def pooled(self, vae: Any, videos: Tensor) -> dict[str, Tensor]:
        """The latents of videos, and those of their first frames with grey frames behind."""
        first = torch.cat([videos[:, :1], torch.full_like(videos[:, 1:], 0.5)], dim=1)
        return {"latents": self.latents(vae, videos), "conditions": self.latents(vae, first)}


def conditioned(noised: Tensor, conditions: Tensor) -> Tensor:
    """The transformer's input [B, 2C + 4, f, h, w]: noised latents, a mask that is 1 at the first frame, conditions."""
    mask = torch.zeros_like(noised[:, :MASK_CHANNELS])
    mask[:, :, 0] = 1
    return torch.cat([noised, mask, conditions], dim=1)


class ImageToVideoTask(TransformerTask):
    """Fine-tune the transformer of `starts_from`, with the first frame as condition; the text encoder is frozen."""

    def __init__(self, architecture: ShapesWanImageToVideo, *, pool: Path, seed: int = 0) -> None:
        super().__init__(architecture, pool=pool, seed=seed)
        start = embedded_pipeline(architecture.starts_from, dtype=torch.float32)
        self.text_encoder.load_state_dict(start.text_encoder.state_dict())
        self.text_encoder.requires_grad_(False)
        weights = start.transformer.state_dict()
        wide = self.transformer.state_dict()["patch_embedding.weight"]
        narrow = weights["patch_embedding.weight"]
        weights["patch_embedding.weight"] = torch.cat([narrow, torch.zeros_like(wide[:, narrow.shape[1] :])], dim=1)
        self.transformer.load_state_dict(weights)
        self.conditions = load_file(pool)["conditions"]

    def transformer_input(self, noised: Tensor, picks: Tensor) -> Tensor:
        """Noised latents beside the mask and the latents of the first frames."""
        return conditioned(noised, self.conditions[picks].float())
