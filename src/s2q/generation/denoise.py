"""Running a pipeline so that a video depends on its prompt and its seed, and not on its neighbours in the batch.

Each video has a `torch.Generator` of its own, seeded with the video's seed. Its first draw is the initial noise, always
in float32 on the CPU and cast afterwards: the same noise in every compute dtype and on every device. A float32 pipeline
called by hand with `generator=torch.Generator().manual_seed(seed)` starts from the same noise. A scheduler that a
pipeline copies, as LTX-2's does for the sound, has generators of its own.

Legend: `B` videos in the batch, `f` latent frames, `C` latent channels, `h`, `w` latent height and width, `F` frames.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from s2q.common.components import transformers_of
from s2q.common.devices import overflow_remedy
from s2q.common.errors import S2QError
from s2q.common.hooks import first_not_finite
from s2q.common.progress import Tick
from s2q.common.seeds import derive_seed
from s2q.generation.conditioning import adapt_call, draws_noise
from s2q.generation.exclusive import exclusive
from s2q.generation.offload import leaving_device
from s2q.generation.prompts import Prompt
from s2q.generation.schedulers import scheduler_of
from s2q.generation.settings import GenerationSettings, latent_channels, latent_frames, text_tokens, vae_factors
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
        Noise of one video in the family's layout, `[1, f, C, h, w]`, `[1, C, f, h, w]`, `[1, f, h, w, C]` or
        `[1, f · h · w, C]`; float32, standard normal, on the CPU; and the generator it came from, for the draws of a
        stochastic scheduler.
    """
    spatial, layout = vae_factors(pipe)[1], family_of(pipe.transformer).latents
    frames, channels = latent_frames(pipe, settings), latent_channels(pipe)
    leading = (frames, channels) if layout == "frames first" else (channels, frames)
    shape = (1, *leading, settings.height // spatial, settings.width // spatial)
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn(shape, generator=generator, dtype=torch.float32)
    if layout == "channels last":
        return noise.movedim(1, -1), generator
    return noise.flatten(2).transpose(1, 2) if layout == "tokens" else noise, generator


def denoise(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    settings: GenerationSettings,
    decode: bool = True,
    steps: int | None = None,
    step_done: Tick = lambda: None,
) -> DenoisingResult:
    """Generate one batch of videos: latents and frames in the order of `prompts`; other threads wait for the pipeline.

    After so many `steps` of those of the settings it ends, with the latents there.

    Raises:
        S2QError: If latents or frames are NaN or infinite, with the layer that is so first.
    """
    assert len(prompts) == len(seeds)
    with exclusive(pipe):
        run = functools.partial(_run, pipe, prompts, seeds=seeds, settings=settings, decode=decode, steps=steps)
        with leaving_device(transformers_of(pipe).values()):
            latents, decoded = run(step_done)
        for kind, values in (("latents", latents), ("frames", decoded)):
            if values is not None and not bool(torch.isfinite(values).all()):
                videos = zip(prompts, seeds, values, strict=True)
                prompt, seed = next((text, seed) for text, seed, video in videos if not bool(video.isfinite().all()))
                modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
                layer = first_not_finite(modules, run)
                raise S2QError(
                    f"the model produced NaN or infinite {kind} for prompt {prompt!r}, seed {seed}"
                    f"{'' if layer is None else f', first in {layer}'}; {overflow_remedy(pipe.text_encoder.dtype)}"
                )
    return DenoisingResult(latents=latents, frames=None if decoded is None else _to_uint8(decoded))


def _run(
    pipe: Any,
    prompts: Sequence[str],
    step_done: Tick = lambda: None,
    *,
    seeds: Sequence[int],
    settings: GenerationSettings,
    decode: bool,
    steps: int | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Call a pipeline; return the final latents, float32 on the CPU, and the frames `[B, F, 3, H, W]` in 0..1."""
    if draws_noise(pipe):
        generators, start = [torch.Generator("cpu").manual_seed(seed) for seed in seeds], {}
    else:
        drawn = [initial_noise(pipe, seed, settings) for seed in seeds]
        start = {"latents": torch.cat([noise for noise, _ in drawn]).to(pipe.text_encoder.dtype)}
        generators = [generator for _, generator in drawn]
    requests, last = [Prompt.of(prompt) for prompt in prompts], dict[str, torch.Tensor]()
    left = itertools.count(-1 if steps is None else steps - 1, -1)

    def after_step(latents: torch.Tensor) -> None:
        channels = family_of(pipe.transformer).latent_channel_dim + 1
        last["latents"] = latents.narrow(channels, 0, latent_channels(pipe))  # before those of an image and a mask
        pipe._interrupt = next(left) == 0  # what a pipeline asks before each step, and resets in the next call
        step_done()

    with ExitStack() as stack:
        arguments = _prepared(pipe, requests, settings, after_step, generators, stack)
        arguments |= {"prompt": list(map(str, requests)), "generator": generators, **start}
        adapt_call(pipe, arguments, requests, settings)
        output = pipe(output_type="pt" if decode else "latent", **arguments)
    return last["latents"].float().cpu(), output.frames if decode else None


def _prepared(
    pipe: Any,
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
    after_step: Callable[[torch.Tensor], None],
    generators: Sequence[torch.Generator],
    stack: ExitStack,
) -> dict[str, Any]:
    """Prepare a pipeline for one call, until the stack is closed; return arguments of the call.

    The call passes the latents of each step to `after_step`. A VAE that cannot decode several videos at once decodes
    them one by one, the pipeline has the scheduler of the settings, and a guider their weight; at most 1 is one branch.
    """
    family, vae = family_of(pipe.transformer), pipe.vae
    arguments = {**family.call, **settings.to_dict()}
    for name in ("scheduler", "shift"):  # are the pipeline's, not the call's
        arguments.pop(name, None)
    arguments.pop("negative_prompt", None)
    given = [
        settings.negative_prompt if prompt.negative_prompt is None else prompt.negative_prompt for prompt in prompts
    ]
    if any(text is not None for text in given):
        arguments["negative_prompt"] = [text or "" for text in given]
    stack.callback(pipe.set_progress_bar_config, **(getattr(pipe, "_progress_bar_config", None) or {}))
    pipe.set_progress_bar_config(disable=True)
    if not (family.decodes_batches or vae.use_slicing):
        vae.enable_slicing()
        stack.callback(vae.disable_slicing)
    scheduler = _set_scheduler(pipe, settings, generators, stack)
    if family.guidance == "guider":
        guider = pipe.guider
        stack.callback(vars(guider).update, dict(vars(guider)))
        guider.guidance_scale = arguments.pop("guidance_scale")
        if guider.guidance_scale > 1:
            guider.enable()
        else:
            guider.disable()
        step = scheduler.step

        def observed_step(*args: Any, **kwargs: Any) -> Any:
            output = step(*args, **kwargs)
            after_step(output[0])
            return output

        scheduler.step = observed_step
        return arguments

    def callback(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        after_step(tensors["latents"])
        return {}

    return arguments | {"max_sequence_length": text_tokens(pipe, settings), "callback_on_step_end": callback}


def _set_scheduler(
    pipe: Any, settings: GenerationSettings, generators: Sequence[torch.Generator], stack: ExitStack
) -> Any:
    """Give a pipeline the scheduler of the settings, until the stack is closed; return it.

    Noise that it draws comes from the videos' generators, which only some pipelines pass.
    """
    scheduler = scheduler_of(pipe, settings)
    if scheduler is not pipe.scheduler:
        stack.callback(setattr, pipe, "scheduler", pipe.scheduler)
        pipe.scheduler = scheduler
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    drawn = {"generator": _Generators(generators)} if takes_generator else {}
    if "step" in vars(scheduler):  # set by the user
        stack.callback(setattr, scheduler, "step", scheduler.step)
    else:
        stack.callback(delattr, scheduler, "step")
    scheduler.step = functools.partial(scheduler.step, **drawn)
    return scheduler


class _Generators(list[torch.Generator]):
    """The generators of the videos of a batch; a copy of them draws other noise, which depends on each seed alone."""

    def __deepcopy__(self, _memo: dict[int, Any]) -> "_Generators":
        seeds = (derive_seed(generator.initial_seed(), "copied scheduler") for generator in self)
        return _Generators(torch.Generator("cpu").manual_seed(seed) for seed in seeds)


def _to_uint8(frames: torch.Tensor) -> torch.Tensor:
    """Turn frames `[B, F, 3, H, W]` in 0..1 into `[B, F, H, W, 3]` uint8 on the CPU."""
    scaled = (frames.float().cpu() * 255).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()
