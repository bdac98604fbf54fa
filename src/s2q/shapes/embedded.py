"""The embedded models by name: their folders, pipelines, prompts and generation settings.

``shapes-cogvideox``, ``shapes-wan`` and ``shapes-wan-i2v``, whose videos start from the first frame of a scene, are
shipped as package data; ``shapes-cogvideox-outliers`` and ``shapes-wan-outliers`` are the same ones with outlier
channels, made on the fly (``s2q.shapes.outliers``).
"""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2q.common.errors import InvalidInputError, unknown_name
from s2q.common.seeds import derive_seed
from s2q.shapes.scenes import SceneLabels, caption, combinations, render, sample_scene, scene_of

EMBEDDED_NAMES: tuple[str, ...] = (
    "shapes-cogvideox",
    "shapes-cogvideox-outliers",
    "shapes-wan",
    "shapes-wan-outliers",
    "shapes-wan-i2v",
)
PROMPT_SPLITS: tuple[str, ...] = ("held-out", "calibration")
_OUTLIERS_SUFFIX, _IMAGE_SUFFIX = "-outliers", "-i2v"
FRAME_RATE = 8
"""Frames per second at which the scenes are to be watched."""


def embedded_folder(name: str) -> Path:
    """The diffusers folder that holds the weights of an embedded model (a variant shares its base's folder)."""
    if name not in EMBEDDED_NAMES:
        raise unknown_name("embedded model", name, EMBEDDED_NAMES)
    return Path(str(files("s2q.shapes").joinpath("data", name.removesuffix(_OUTLIERS_SUFFIX))))


def has_outliers(name: str) -> bool:
    """Whether an embedded model is a stress variant: `add_outliers` changes the weights of its folder."""
    return name.endswith(_OUTLIERS_SUFFIX)


def starts_from_image(name: str) -> bool:
    """Whether the videos of an embedded model start from an image."""
    return name.endswith(_IMAGE_SUFFIX)


def embedded_pipeline(name: str, *, dtype: torch.dtype) -> Any:
    """Load an embedded model (shipped in bfloat16) on the CPU in a floating dtype, its progress bar off."""
    from diffusers import DiffusionPipeline

    from s2q.shapes.outliers import add_outliers

    pipeline = DiffusionPipeline.from_pretrained(embedded_folder(name), dtype=dtype, local_files_only=True)
    if has_outliers(name):
        add_outliers(pipeline.transformer)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generation_defaults(name: str) -> dict[str, Any]:
    """``num_inference_steps``, ``guidance_scale``, ``height``, ``width``, ``num_frames`` of the judged videos."""
    settings: dict[str, Any] = json.loads((embedded_folder(name) / "generation.json").read_text())
    return settings


def embedded_prompts(name: str, *, split: str = "held-out", count: int | None = None) -> list[str]:
    """The first ``count`` prompts (default: all) of a split, always the same ones in the same order.

    ``held-out`` has combinations that were never trained on, ``calibration`` trained combinations.
    """
    if name not in EMBEDDED_NAMES:
        raise unknown_name("embedded model", name, EMBEDDED_NAMES)
    if split not in PROMPT_SPLITS:
        raise unknown_name("prompt split", split, PROMPT_SPLITS)
    labels = combinations(held_out=split == "held-out")
    order = torch.Generator().manual_seed(derive_seed(0, "prompts", split))
    labels = [labels[i] for i in torch.randperm(len(labels), generator=order).tolist()]
    if count is not None and count > len(labels):
        raise InvalidInputError(
            f"{name}: {count} {split} prompts requested, but only {len(labels)} exist; request fewer"
        )
    return [_phrase(label, index, split) for index, label in enumerate(labels[:count])]


def first_frame(name: str, prompt: str) -> Tensor | None:
    """The first frame, ``[H, W, 3]`` uint8, of a scene that a caption describes; the same caption, the same frame.

    None for a model whose videos do not start from an image, and for a prompt that is no caption.
    """
    if not starts_from_image(name):
        return None
    settings = generation_defaults(name)
    generator = torch.Generator().manual_seed(derive_seed(0, "scene", prompt))
    scene = scene_of(prompt, size=int(settings["height"]), generator=generator)
    if scene is None:
        return None
    frame = render(scene, num_frames=1, size=int(settings["height"]))[0]
    return (frame * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()


def _phrase(labels: SceneLabels, index: int, split: str) -> str:
    generator = torch.Generator().manual_seed(derive_seed(0, "phrase", split, index))
    return caption(sample_scene(labels, generator=generator), generator=generator)
