"""Running a pipeline so that a video depends on its prompt and its seed, and not on its neighbours in the batch.

Each video has a `torch.Generator` of its own, seeded with the video's seed. Its first draw is the initial noise, always
in float32 on the CPU and cast afterwards: the same noise in every compute dtype and on every device. A float32 pipeline
called by hand with `generator=torch.Generator().manual_seed(seed)` starts from the same noise.

Legend: `B` videos in the batch, `f` latent frames, `C` latent channels, `h`, `w` latent height and width, `F` frames.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from s2q.common.devices import overflow_remedy
from s2q.common.errors import S2QError
from s2q.common.progress import Tick
from s2q.generation.settings import GenerationSettings, latent_channels, latent_frames, prompt_token_limit, vae_factors
from s2q.models import family_of


@dataclass(frozen=True, kw_only=True)
class DenoisingResult:
    """Final latents of one batch and its frames, on the CPU.

    Attributes:
        latents: float32, in the transformer's units: `[B, f, C, h, w]`, or as the family has them (`initial_noise`).
        frames: `[B, F, H, W, 3]`, uint8; None when decoding was not asked for.
    """

    latents: torch.Tensor
    frames: torch.Tensor | None


def initial_noise(pipe: Any, seed: int, settings: GenerationSettings) -> tuple[torch.Tensor, torch.Generator]:
    """Draw the initial noise of one video.

    Returns:
        Noise of one video in the family's layout, `[1, f, C, h, w]`, `[1, C, f, h, w]` or `[1, f · h · w, C]`; float32,
        standard normal, on the CPU; and the generator it came from, for the draws of a stochastic scheduler.
    """
    spatial, layout = vae_factors(pipe)[1], family_of(pipe.transformer).latents
    frames, channels = latent_frames(pipe, settings), latent_channels(pipe)
    leading = (frames, channels) if layout == "frames first" else (channels, frames)
    shape = (1, *leading, settings.height // spatial, settings.width // spatial)
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn(shape, generator=generator, dtype=torch.float32)
    return noise.flatten(2).transpose(1, 2) if layout == "tokens" else noise, generator


def denoise(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    settings: GenerationSettings,
    decode: bool = True,
    step_done: Tick | None = None,
) -> DenoisingResult:
    """Generate one batch of videos: latents and frames in the order of `prompts`."""
    assert len(prompts) == len(seeds)
    drawn = [initial_noise(pipe, seed, settings) for seed in seeds]
    noise = torch.cat([noise for noise, _ in drawn]).to(pipe.text_encoder.dtype)
    last: dict[str, torch.Tensor] = {}

    def after_step(latents: torch.Tensor) -> None:
        last["latents"] = latents
        if step_done is not None:
            step_done()

    quiet = dict(getattr(pipe, "_progress_bar_config", {}) or {})
    pipe.set_progress_bar_config(disable=True)
    try:
        with _call_arguments(pipe, settings, after_step) as arguments, _decodable(pipe):
            output = pipe(
                prompt=list(prompts),
                latents=noise,
                generator=[generator for _, generator in drawn],
                output_type="pt" if decode else "latent",
                **arguments,
            )
    finally:
        pipe.set_progress_bar_config(**quiet)
    latents = last["latents"].float().cpu()
    for prompt, seed, video in zip(prompts, seeds, latents, strict=True):
        if not torch.isfinite(video).all():
            raise S2QError(
                f"the model produced NaN or infinite latents for prompt {prompt!r}, seed {seed}; "
                f"{overflow_remedy(pipe.text_encoder.dtype)}"
            )
    frames = _to_uint8(output.frames) if decode else None
    return DenoisingResult(latents=latents, frames=frames)


@contextmanager
def _call_arguments(
    pipe: Any, settings: GenerationSettings, after_step: Callable[[torch.Tensor], None]
) -> Iterator[dict[str, Any]]:
    """Arguments of a pipeline's call from the settings; they pass the latents of each step to `after_step`."""
    arguments = settings.to_dict()
    if family_of(pipe.transformer).guidance == "guider":
        weight = arguments.pop("guidance_scale")
        with _guided_by(pipe.guider, weight), _observe_steps(pipe.scheduler, after_step):
            yield arguments
        return

    def callback(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        after_step(tensors["latents"])
        return {}

    yield arguments | {"max_sequence_length": prompt_token_limit(pipe), "callback_on_step_end": callback}


@contextmanager
def _decodable(pipe: Any) -> Iterator[None]:
    """Have a VAE that cannot decode several videos at once decode them one by one."""
    if family_of(pipe.transformer).decodes_batches or pipe.vae.use_slicing:
        yield
        return
    pipe.vae.enable_slicing()
    try:
        yield
    finally:
        pipe.vae.disable_slicing()


@contextmanager
def _guided_by(guider: Any, weight: float) -> Iterator[None]:
    """Have a guider of classifier-free guidance use a weight for a while; at most 1 is one branch."""
    before = dict(vars(guider))
    guider.guidance_scale = weight
    if weight > 1:
        guider.enable()
    else:
        guider.disable()
    try:
        yield
    finally:
        vars(guider).update(before)


@contextmanager
def _observe_steps(scheduler: Any, listener: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Pass the latents that each step of a scheduler returns to a listener."""
    step = scheduler.step

    def observed_step(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        listener(output[0])
        return output

    scheduler.step = observed_step
    try:
        yield
    finally:
        del scheduler.step


def _to_uint8(frames: torch.Tensor) -> torch.Tensor:
    """Turn frames `[B, F, 3, H, W]` in 0..1 into `[B, F, H, W, 3]` uint8 on the CPU."""
    scaled = (frames.float().cpu() * 255).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()
