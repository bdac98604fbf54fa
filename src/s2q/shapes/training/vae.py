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
    """Go on with the decoder alone: the latents stay what they are, so the transformer can already train on them.

    Args:
        start: Training folder of the autoencoder to start from.
    """

    def __init__(self, *, start: Path) -> None:
        super().__init__()
        load_average(self.vae, start / "ema.safetensors", prefix="vae.")
        self.vae.encoder.requires_grad_(False)


@torch.no_grad()
def scale_latents(vae: AutoencoderKLCogVideoX, spread: Tensor) -> None:
    """Fold a per-channel division of the latents by ``spread`` into the weights; reconstructions stay as they are.

    The encoder's last convolution is scaled down and every layer of the decoder that reads latents is scaled up,
    because the pipeline offers one scaling factor for all channels.

    Args:
        vae: Changed in place.
        spread: ``[C]``, standard deviation of each latent channel.
    """
    channels = len(spread)
    weight, bias = vae.encoder.conv_out.conv.weight, vae.encoder.conv_out.conv.bias
    weight[:channels] /= spread.view(-1, 1, 1, 1, 1)
    bias[:channels] /= spread
    bias[channels:] -= 2 * spread.log()  # the log variance of a divided value
    readers = [vae.decoder.conv_in.conv]
    for module in vae.decoder.modules():
        if type(module).__name__ == "CogVideoXSpatialNorm3D":
            readers += [module.conv_y.conv, module.conv_b.conv]
    for convolution in readers:
        convolution.weight *= spread.view(1, -1, 1, 1, 1)
