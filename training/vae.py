"""The autoencoders' trainers: one from nothing, one that takes over the latents of another embedded model."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor, nn

from s2q.shapes.scenes import combinations
from training.architecture import LATENT_CHANNELS, LATENT_FRAMES, LATENT_SIZE, EmbeddedArchitecture
from training.cogvideox import ShapesCogVideoX
from training.loop import load_average
from training.videos import sample_batch, sample_training_batch

KL_WEIGHT = 1e-4
LATENT_NOISE = 0.05
"""Standard deviation of what is added to the latents that a taught decoder reads: generated ones are not exact."""
_LATENT_SHAPE = (LATENT_CHANNELS, LATENT_FRAMES, LATENT_SIZE, LATENT_SIZE)


def reconstruction_loss(error: Tensor) -> tuple[Tensor, dict[str, float]]:
    """L1 + MSE + L1 of the spatial differences (edges carry the shape) of errors [B, 3, F, H, W]; PSNR in dB to log."""
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    mse = error.square().mean()
    return error.abs().mean() + mse + edges, {"psnr_db": float(-10 * torch.log10(mse.detach() / 4))}


class VAETask:
    """Reconstruct scenes, with ``KL_WEIGHT`` times the KL divergence a latent value."""

    def __init__(self, *, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.vae = ShapesCogVideoX().build_vae()
        self.modules = nn.ModuleDict({"vae": self.vae})

    def loss(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Loss of a fresh batch of scenes."""
        videos, _ = sample_training_batch(batch_size, generator=generator)
        device = next(self.vae.parameters()).device
        target = videos.transpose(1, 2).to(device) * 2 - 1
        with torch.autocast(device.type, torch.bfloat16):
            posterior = self.vae.encode(target).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
            output = self.vae.decode(posterior.mean + posterior.std * noise).sample
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss, figures = reconstruction_loss(output.float() - target)
        return loss + KL_WEIGHT * divergence, figures | {"kl": float(divergence.detach())}


class DecoderTask(VAETask):
    """Train the decoder alone, on normalised latents, which do not change: the transformer can train on them."""

    def __init__(self, *, start: Path) -> None:
        super().__init__()
        self.vae = normalised_vae(start)
        self.vae.encoder.requires_grad_(False)
        self.modules = nn.ModuleDict({"vae": self.vae})


@torch.no_grad()
def normalised_vae(folder: Path) -> AutoencoderKLCogVideoX:
    """The averaged weights of a finished run of ``VAETask``, each latent channel at mean 0 and spread 1."""
    architecture = ShapesCogVideoX()
    vae = architecture.build_vae().eval()
    load_average(vae, folder / "ema.safetensors", prefix="vae.")
    videos, _ = sample_batch(combinations(held_out=False), generator=torch.Generator().manual_seed(3))
    latents = architecture.latents(vae, videos).transpose(0, 1).flatten(1)
    normalise_latents(vae, mean=latents.mean(dim=1), spread=latents.std(dim=1))
    return vae


@torch.no_grad()
def normalise_latents(vae: AutoencoderKLCogVideoX, *, mean: Tensor, spread: Tensor) -> None:
    """Fold ``(latent - mean) / spread``, both ``[C]``, into the weights: the pipeline has one factor for all channels.

    The encoder's last convolution takes the shift and the scale, every layer of the decoder that reads latents undoes
    them. The scale does not change reconstructions, nor does the shift except at the frame's border, where the
    decoder's first convolution pads with zeros (which the decoder then learns anew).
    """
    channels = len(spread)
    weight, bias = vae.encoder.conv_out.conv.weight, vae.encoder.conv_out.conv.bias
    weight[:channels] /= spread.view(-1, 1, 1, 1, 1)
    bias[:channels] = (bias[:channels] - mean) / spread
    bias[channels:] -= 2 * spread.log()  # the other half of the output is the log variance
    readers = [vae.decoder.conv_in.conv]
    for module in vae.decoder.modules():
        if type(module).__name__ == "CogVideoXSpatialNorm3D":
            readers += [module.conv_y.conv, module.conv_b.conv]
    for convolution in readers:
        convolution.bias += torch.einsum("oc...,c->o", convolution.weight, mean)
        convolution.weight *= spread.view(1, -1, 1, 1, 1)


class TaughtVAETask:
    """Learn the latents of a trained autoencoder: the encoder to make them, the decoder to read them.

    Both learn from the teacher's latents and neither waits for the other. Wan's blocks normalise every position over
    its channels, and from nothing they first unlearn what they read (PSNR 14.6 dB after 320 steps, where CogVideoX's
    had 20.8 after 300).
    """

    def __init__(
        self,
        architecture: EmbeddedArchitecture,
        *,
        teacher: Any,
        teacher_architecture: EmbeddedArchitecture,
        seed: int = 0,
    ) -> None:
        self.architecture, self.teacher_architecture = architecture, teacher_architecture
        self.teacher = teacher.requires_grad_(False).eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.vae = architecture.build_vae()
        self.modules = nn.ModuleDict({"vae": self.vae})

    def loss(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Loss of a fresh batch of scenes: the latents' squared error and the reconstruction from the teacher's."""
        device = next(self.vae.parameters()).device
        self.teacher.to(device)
        videos = sample_training_batch(batch_size, generator=generator)[0].to(device)
        noise = LATENT_NOISE * torch.randn(batch_size, *_LATENT_SHAPE, generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            wanted = self.teacher_architecture.latents(self.teacher, videos).float()
            latents = self.architecture.latents(self.vae, videos).float()
            output = self.architecture.decoded(self.vae, wanted + noise).float()
        latent_error = (latents - wanted).square().mean()
        loss, figures = reconstruction_loss(output - (videos.transpose(1, 2) * 2 - 1))
        return loss + latent_error, figures | {"latent_error": float(latent_error.detach())}
