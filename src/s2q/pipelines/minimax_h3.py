"""MiniMax-H3: text to video with sound (`t2va`), by the steps of its modular pipeline.

One call makes one video, of 5 to 15 seconds. Guidance is distilled into the transformer. The schedule has one more
point than steps are denoised: `num_inference_steps` here is the number of steps, 49 for the 50 of diffusers' own call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.loaders import MiniMaxH3LoraLoaderMixin
from torch import Tensor, nn

from s2q.common.errors import InvalidInputError
from s2q.pipelines.modular import ModularPipeline

STEPS = 49
_AUDIO_CHANNELS = 2
_FRAME_RATE = 24


@dataclass
class MiniMaxH3Output:
    """Video and sound of a call.

    Attributes:
        frames: Videos in the form of `output_type`; of "latent" the latents [1, C, f, h, w], float32.
        audio: Their sound [1, 2, samples], float32, at the rate of `audio_vae`; None of latents.
    """

    frames: Any
    audio: Tensor | None = None


class TextProcessor:
    """The part of Qwen3-VL's processor that text alone needs; the whole one needs torchvision."""

    def create_mm_token_type_ids(self, token_ids: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return the kind of each token: 0, text."""
        return [[0] * len(tokens) for tokens in token_ids]


class MiniMaxH3Pipeline(ModularPipeline, MiniMaxH3LoraLoaderMixin):
    """MiniMax-H3 with the interface of a text-to-video pipeline of diffusers.

    Args:
        canvas_short_edge: Shorter side of a video of the default size, in pixels.
        canvas_max_pixels: Most pixels of a frame of the default size.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae->audio_vae"

    def __init__(
        self,
        *,
        transformer: nn.Module,
        vae: nn.Module,
        audio_vae: nn.Module,
        scheduler: Any,
        audio_scheduler: Any,
        text_encoder: nn.Module | None,
        tokenizer: Any,
        canvas_short_edge: int = 768,
        canvas_max_pixels: int = 768 * 1344,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer,
            vae=vae,
            audio_vae=audio_vae,
            scheduler=scheduler,
            audio_scheduler=audio_scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        self.register_to_config(canvas_short_edge=canvas_short_edge, canvas_max_pixels=canvas_max_pixels)

    @property
    def vae_temporal_compression_ratio(self) -> int:
        """Frames of a latent frame; the first of each group of 17 frames has one of its own."""
        return int(self.vae.temporal_compression_ratio)

    @property
    def vae_spatial_compression_ratio(self) -> int:
        """Pixels of a latent pixel, a side."""
        return int(self.vae.spatial_compression_ratio)

    def audio_tokens(self, num_frames: int) -> int:
        """Return the tokens of the sound of a video, of both channels."""
        rate = self.audio_vae.config.sampling_rate / self.audio_vae.hop_length
        return _AUDIO_CHANNELS * round(num_frames / _FRAME_RATE * rate)

    def __call__(
        self,
        prompt: str,
        *,
        num_frames: int = 124,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = STEPS,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
        max_sequence_length: int | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], Any] | None = None,
    ) -> MiniMaxH3Output:
        """Generate a video with sound.

        Args:
            prompt: One text.
            num_frames: 17 n + 5, 124 to 345; others are rounded up.
            height: Of a frame, in pixels, a multiple of 32; 768 with the width 1344 if both are None.
            num_inference_steps: Denoising steps.
            guidance_scale: At most 1: there is no guidance.
            generator: Draws the noise of the video, then that of the sound, in float32.
            max_sequence_length: Most tokens of the prompt, which is never cut; None does not limit it.
            output_type: "pil", "np", "pt" [1, F, 3, H, W] in 0..1, or "latent".
            callback_on_step_end: Called after a step with this pipeline, the index of the step, its timestep (0 is
                noise, 1 the video) and the tokens of the video [1, f · h · w, C] as "latents".
        """
        from diffusers import MiniMaxH3Blocks

        if guidance_scale > 1:
            raise InvalidInputError(
                f"guidance_scale: got {guidance_scale:g}; guidance is distilled into MiniMax-H3, use 1"
            )
        count = len(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        if max_sequence_length is not None and count > max_sequence_length:
            raise InvalidInputError(
                f"prompt: has {count} tokens, more than max_sequence_length={max_sequence_length}; shorten it"
            )
        is_latent = output_type == "latent"
        state = self.run(
            MiniMaxH3Blocks().get_workflow("t2va"),
            helpers={"processor": TextProcessor()},
            skipped=("decode.video", "decode.audio") if is_latent else (),
            step_done=callback_on_step_end,
            prompt=prompt,
            num_frames=num_frames,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps + 1,
            generator=generator,
            output_type="pt" if is_latent else output_type,
        )
        if is_latent:
            return MiniMaxH3Output(frames=state.get("latents"))
        return MiniMaxH3Output(frames=state.get("videos"), audio=state.get("audio"))
