"""Full-precision quality of a trained pipeline: adherence to prompts by the detector, a sheet of samples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from s2q.shapes.detector import detect
from s2q.shapes.scenes import SceneLabels, parse_caption
from training.architecture import TEXT_TOKENS

LABEL_FIELDS = ("shape", "colour", "motion", "background")


@torch.no_grad()
def sample(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    images: Sequence[Tensor] | None = None,
    seed: int,
    batch_size: int = 16,
    **settings: Any,
) -> Tensor:
    """One video a prompt, ``[B, F, 3, H, W]`` in ``[0, 1]``; every video has a generator of its own.

    With images, one a prompt, ``[H, W, 3]`` uint8, a call of the pipeline makes one video.
    """
    pipeline.set_progress_bar_config(disable=True)
    videos, batch_size = [], batch_size if images is None else 1
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        generators = [torch.Generator().manual_seed(seed * 100_003 + start + i) for i in range(len(batch))]
        first = {} if images is None else {"image": Image.fromarray(images[start].numpy())}
        result = pipeline(
            prompt=batch, generator=generators, output_type="pt", max_sequence_length=TEXT_TOKENS, **first, **settings
        )
        videos.append(result.frames.float().cpu())
    return torch.cat(videos)


def first_frame_psnr(videos: Tensor, images: Sequence[Tensor]) -> float:
    """Mean PSNR in dB of the first frames of videos [B, F, 3, H, W] in [0, 1] against images [H, W, 3] uint8."""
    given = torch.stack([image.permute(2, 0, 1).float() / 255 for image in images])
    errors = (videos[:, 0] - given).square().mean(dim=(1, 2, 3))
    return float((-10 * torch.log10(errors)).mean())


def adherence(prompts: Sequence[str], videos: Tensor) -> dict[str, float]:
    """Share of the videos in which the detector finds what the prompt names, by label."""
    return label_accuracy(videos, [parse_caption(prompt) for prompt in prompts])


def label_accuracy(videos: Tensor, labels: Sequence[SceneLabels]) -> dict[str, float]:
    """Share of the videos whose shape, colour, motion and background the detector names right, by label."""
    detected = [detect(video) for video in videos]
    return {
        field: sum(getattr(a, field) == getattr(b, field) for a, b in zip(detected, labels, strict=True)) / len(labels)
        for field in LABEL_FIELDS
    }


def write_sheet(videos: Tensor, path: Path, *, columns: int = 3, enlarge: int = 3) -> None:
    """Save videos as one picture: a strip of frames each, ``columns`` strips a row."""
    strips = [torch.cat(list(video), dim=-1) for video in videos]
    padded = [torch.nn.functional.pad(strip, (2, 2, 2, 2), value=1.0) for strip in strips]
    rows = [torch.cat(padded[i : i + columns], dim=-1) for i in range(0, len(padded) - columns + 1, columns)]
    pixels = (torch.cat(rows, dim=-2).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels)
    picture.resize((picture.width * enlarge, picture.height * enlarge), Image.Resampling.NEAREST).save(path)
