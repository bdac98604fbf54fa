"""The autoencoder's trainer: reconstruction of random scenes, a light KL term, and latents scaled to unit spread."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor, nn

from s2q.shapes.architecture import FRAME_SIZE, NUM_FRAMES, build_vae
from s2q.shapes.scenes import combinations, sample_batch
from s2q.shapes.training.loop import load_average

KL_WEIGHT = 1e-4


class VAETask:
    """Reconstruct scenes of the training combinations.

    Loss: L1 + MSE + L1 of the spatial differences (edges carry the shape) + ``KL_WEIGHT`` times the KL divergence a
    latent value.
    """

    def __init__(self, *, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.vae = build_vae()
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
        start: Training folder of the autoencoder to start from.
    """

    def __init__(self, *, start: Path) -> None:
        super().__init__()
        self.vae = normalised_vae(start)
        self.vae.encoder.requires_grad_(False)
        self.modules = nn.ModuleDict({"vae": self.vae})


@torch.no_grad()
def normalised_vae(folder: Path) -> AutoencoderKLCogVideoX:
    """The averaged weights of a finished run of ``VAETask``, each latent channel at mean 0 and spread 1."""
    vae = build_vae().eval()
    load_average(vae, folder / "ema.safetensors", prefix="vae.")
    videos, _ = sample_batch(combinations(held_out=False), generator=torch.Generator().manual_seed(3))
    latents = vae.encode(videos.permute(0, 2, 1, 3, 4) * 2 - 1).latent_dist.mean.transpose(0, 1).flatten(1)
    normalise_latents(vae, mean=latents.mean(dim=1), spread=latents.std(dim=1))
    return vae


@torch.no_grad()
def normalise_latents(vae: AutoencoderKLCogVideoX, *, mean: Tensor, spread: Tensor) -> None:
    """Fold ``(latent - mean) / spread`` into the weights: the pipeline offers one factor for all channels.

    The encoder's last convolution takes the shift and the scale, every layer of the decoder that reads latents
    undoes them. The scale leaves reconstructions as they are; the shift does so except at the frame's border, where
    the decoder's first convolution pads with zeros (which the decoder then learns anew).

    Args:
        vae: Changed in place.
        mean: ``[C]``, mean of each latent channel.
        spread: ``[C]``, standard deviation of each latent channel.
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
