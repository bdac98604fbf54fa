"""Tiny random pipelines of every family, built in memory without any download: `tiny_pipeline("wan")`.

Everything is a function of the seed. The families are in `tiny_families`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXPipeline, CogVideoXVideoToVideoPipeline, DiffusionPipeline
from PIL import Image

from s2q.generation.conditioning import image_to_video, takes_batches
from s2q.generation.load import load_pipeline
from s2q.generation.prompts import Prompt, prompt_list
from s2q.generation.settings import prompt_token_limit, vae_factors
from s2q.models import family_of
from s2q.models.synthetic import SyntheticModel, synthetic_model
from s2q.ops.activation_path import transform_input
from s2q.pipelines import INDEX, find_index
from tiny_families import FAMILIES, TEXT_LENGTH, TinyFamily

TINY_CALL: dict[str, Any] = {
    "num_inference_steps": 2,
    "height": 16,
    "width": 16,
    "num_frames": 9,
    "max_sequence_length": TEXT_LENGTH,
}
"""Arguments of a call of a tiny CogVideoX pipeline: 9 frames (3 latent ones) of 16 x 16 pixels."""


def tiny_pipeline(
    name: str,
    seed: int = 0,
    *,
    num_layers: int | None = None,
    boundary_ratio: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> DiffusionPipeline:
    """A complete random pipeline of an entry of `FAMILIES`.

    Args:
        name: Of the entry.
        seed: Of all weights.
        num_layers: Blocks of the transformer in place of the entry's.
        boundary_ratio: Between the two transformers of Wan 2.2 A14B, in place of the entry's.
        dtype: Of all weights but those that a class keeps in fp32.
    """
    family = FAMILIES[name]
    options = dict(family.options)
    if boundary_ratio is not None:
        options["boundary_ratio"] = boundary_ratio
    layers = num_layers or family.config["num_layers"]
    parts: dict[str, Any] = {"transformer": _stirred(family, seed, layers, dtype)}
    if family.fresh_vae:
        torch.manual_seed(seed)
    parts["vae"] = family.vae().eval().to(dtype)
    for part, value in family.texts(seed).items():
        parts[part] = value.eval().to(dtype) if isinstance(value, torch.nn.Module) else value
    if "boundary_ratio" in options:
        parts["transformer_2"] = _stirred(family, seed + 2, layers - 1, dtype)
    pipe = family.pipeline(**parts, **options, scheduler=family.scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reloaded(folder: Path, dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """A saved pipeline as its users load it: by diffusers, or by s2q where diffusers has no pipeline of one class."""
    if find_index(folder).name == INDEX:
        return DiffusionPipeline.from_pretrained(folder, dtype=dtype)
    return load_pipeline(folder, dtype=dtype)


def video_to_video() -> DiffusionPipeline:
    """A tiny pipeline that needs a video, which neither calibration nor `generate` runs."""
    return CogVideoXVideoToVideoPipeline(**tiny_pipeline("cogvideox").components)


def tiny_transformer(name: str = "cogvideox", *, seed: int = 0, num_layers: int | None = None) -> torch.nn.Module:
    """The random transformer of an entry of `FAMILIES`, its biases and norms as its class makes them."""
    family = FAMILIES[name]
    return _transformer(family, seed, num_layers or family.config["num_layers"])


def _transformer(family: TinyFamily, seed: int, num_layers: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = dict(family.config) | {"num_layers": num_layers}
    if "num_text_blocks" in config:
        config["num_visual_blocks"] = config.pop("num_layers")
    if "vace_layers" in config:
        config["vace_layers"] = [layer for layer in config["vace_layers"] if layer < num_layers]
    return family.transformer(**config).eval()


def _stirred(family: TinyFamily, seed: int, num_layers: int, dtype: torch.dtype) -> torch.nn.Module:
    """A transformer whose biases and norms are random too, so that a test which drops one of them fails."""
    transformer = _transformer(family, seed, num_layers)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    transformer.to(dtype)
    kept = set(transformer._keep_in_fp32_modules or ())
    for name, parameter in transformer.named_parameters():
        if kept & set(name.split(".")):
            parameter.data = parameter.data.float()
    return transformer


def video_size(pipe: DiffusionPipeline) -> dict[str, int]:
    """A small video: 3 latent frames and 16 pixels a side, or what the pipeline makes at least."""
    side = getattr(pipe, "target_size", 0) if "ImageToVideo" in type(pipe).__name__ else 0
    side = side or max(16, family_of(pipe.transformer).size_multiple)
    known = image_to_video(pipe)
    groups = family_of(pipe.transformer).frame_groups
    least = groups.least if groups is not None else 1 if known is None else known.least_frames
    frames = max(2 * vae_factors(pipe)[0] + 1, least)
    return {"num_frames": frames, "height": side, "width": side}


def image_prompts(*texts: str, pipe: DiffusionPipeline | None = None) -> list[dict[str, Any]]:
    """Prompts with an image each, a square of another colour in a corner, and the videos that the pipeline needs."""
    known = None if pipe is None else image_to_video(pipe)
    videos = () if known is None else known.videos
    prompts = []
    for text, colour in zip(texts, ("red", "blue", "green", "white"), strict=False):
        prompts.append({"prompt": text, "image": _square(colour, 0)} | {name: moving_square(colour) for name in videos})
    return prompts


def moving_square(colour: str, *, frames: int = 9) -> list[Image.Image]:
    """The frames of a video: a square that moves to the right."""
    return [_square(colour, 2 * frame) for frame in range(frames)]


def _square(colour: str, left: int) -> Image.Image:
    image = Image.new("RGB", (40, 24))
    image.paste(colour, (left, 0, left + 20, 12))
    return image


def prompts_for(pipe: DiffusionPipeline, *texts: str) -> list[Prompt]:
    """Prompts of texts, with the images and videos that the pipeline needs."""
    return prompt_list("prompts", texts if image_to_video(pipe) is None else image_prompts(*texts, pipe=pipe))


def prompts_of_a_call(pipe: DiffusionPipeline) -> list[Prompt]:
    """Two prompts, or one where the pipeline takes one a call."""
    return prompts_for(pipe, "red", "blue")[: 2 if takes_batches(pipe) else 1]


def tiny_call(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Arguments of a quick call: two steps of a small video, prompts as long as the pipeline takes."""
    family, size = family_of(pipe.transformer), video_size(pipe)
    size[family.frames_argument] = size.pop("num_frames")
    guided = family.guidance == "guider"
    length = {} if guided else {"max_sequence_length": prompt_token_limit(pipe)}
    return {**family.call, **size, **length, "num_inference_steps": 2}


def transformer_inputs(*, seed: int = 0, batch: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random inputs of a tiny transformer (without rotary embeddings), as keyword arguments of its forward."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 3, 4, 2, 2, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch, TEXT_LENGTH, 32, generator=generator).to(dtype),
        "timestep": torch.full((batch,), 7),
    }


@torch.no_grad()
def run_transformer(transformer: torch.nn.Module, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The output of a tiny transformer on `transformer_inputs(seed=seed)`, as float32."""
    inputs = transformer_inputs(seed=seed, dtype=dtype)
    return transformer(**inputs, return_dict=False)[0].float()


@torch.no_grad()
def run_pipeline(pipe: CogVideoXPipeline, *, prompt: str = "a red circle", seed: int = 0, **call: Any) -> torch.Tensor:
    """Frames (or latents with `output_type="latent"`) of one tiny video, float."""
    arguments = {**TINY_CALL, "output_type": "pt", **call}
    return pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), **arguments).frames


def split_input(layer, x):
    """What a packed linear quantizes of an input, and what its low-rank branch adds to the output."""
    quantized, coefficients = transform_input(x, layer.input_tensors())
    return quantized, None if coefficients is None else coefficients @ layer.low_rank_weight.float().t()


def shrunken(name: str) -> SyntheticModel:
    """A synthetic model of the same structure with two blocks a list and 2 heads of 48 channels."""
    model = synthetic_model(name)
    small = {
        "num_attention_heads": 2,
        "attention_head_dim": 48,
        "model_dim": 96,
        "axes_dims": [16, 16, 16],
        "ff_dim": 64,
    }
    others = {"ffn_dim": 64, "cross_attention_dim": 96, "audio_num_attention_heads": 2, "audio_attention_head_dim": 24}
    others |= {"audio_cross_attention_dim": 48, "added_kv_proj_dim": 96}
    others |= {"num_cross_attention_heads": 2, "cross_attention_head_dim": 48}
    others |= {"hidden_size": 96, "rope_freq_dim": 8, "time_embed_dim": 96}
    small = {key: size for key, size in (small | others).items() if key in model.config}
    for argument in (blocks.argument for blocks in model.block_lists):
        small[argument] = [0, 1] if isinstance(model.config[argument], list) else 2
    lists = tuple(replace(one, count=2) for one in model.block_lists)
    return replace(
        model,
        config=dict(model.config) | small,
        block_lists=lists,
        tokens=10,
        text_tokens=512 if model.image_tokens else 6,  # Wan's blocks take the last 512 for those of the text
        image_tokens=min(model.image_tokens, 5),
        audio_tokens=4,
    )


class ListedSamples(list):
    """Samples of a block that lie in memory, as distillation takes them."""

    device = "cpu"

    def read(self, index):
        return self[index]

    def to_device(self, sample):
        return sample

    def __getitem__(self, index):
        found = super().__getitem__(index)
        return ListedSamples(found) if isinstance(index, slice) else found
