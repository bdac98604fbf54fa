"""The autoencoder's trainer: reconstruction of random scenes, a light KL term, and latents scaled to unit spread."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2q.shapes.architecture import FRAME_SIZE, NUM_FRAMES, EmbeddedArchitecture
from s2q.shapes.scenes import combinations, sample_batch
from s2q.shapes.training.loop import load_average

KL_WEIGHT = 1e-4


class VAETask:
    """Reconstruct scenes of the training combinations.

    Loss: L1 + MSE + L1 of the spatial differences (edges carry the shape) + ``KL_WEIGHT`` times the KL divergence a
    latent value.
    """

    def __init__(self, architecture: EmbeddedArchitecture, *, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.vae = architecture.build_vae()
        self.modules = nn.ModuleDict({"vae": self.vae})
        self.labels = combinations(held_out=False)

    def loss(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Loss of a fresh batch of scenes."""
        picks = torch.randint(len(self.labels), (batch_size,), generator=generator).tolist()
        videos, _ = sample_batch(
            [self.labels[i] for i in picks], num_frames=NUM_FRAMES, size=FRAME_SIZE, generator=generator
        )
        device = next(self.vae.parameters()).device
        target = videos.permute(0, 2, 1, 3, 4).to(device) * 2 - 1  # [B, 3, F, H, W] in [-1, 1]
        with torch.autocast(device.type, torch.bfloat16):
            posterior = self.vae.encode(target).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
            output = self.vae.decode(posterior.mean + posterior.std * noise).sample
        error = output.float() - target
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        mse = error.square().mean()
        loss = error.abs().mean() + mse + edges + KL_WEIGHT * divergence
        return loss, {"psnr_db": float(-10 * torch.log10(mse.detach() / 4)), "kl": float(divergence.detach())}


class DecoderTask(VAETask):
    """Go on with the decoder alone, on normalised latents: they stay, so the transformer can train on them.

    Args:
        architecture: Of the model.
        start: Training folder of the autoencoder to start from.
    """

    def __init__(self, architecture: EmbeddedArchitecture, *, start: Path) -> None:
        super().__init__(architecture)
        self.vae = normalised_vae(architecture, start)
        for part in architecture.encoder_parts:
            getattr(self.vae, part).requires_grad_(False)
        self.modules = nn.ModuleDict({"vae": self.vae})


@torch.no_grad()
def normalised_vae(architecture: EmbeddedArchitecture, folder: Path) -> Any:
    """The averaged weights of a finished run of ``VAETask``, each latent channel at mean 0 and spread 1."""
    vae = architecture.build_vae().eval()
    load_average(vae, folder / "ema.safetensors", prefix="vae.")
    videos, _ = sample_batch(combinations(held_out=False), generator=torch.Generator().manual_seed(3))
    latents = architecture.latents(vae, videos).transpose(0, 1).flatten(1)
    architecture.normalise_latents(vae, mean=latents.mean(dim=1), spread=latents.std(dim=1))
    return vae
