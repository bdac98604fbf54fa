"""Batches of scenes as videos, and the words of their captions.

The same state of the ``torch.Generator`` gives the same pixels and captions.

Legend of shapes: ``B`` videos, ``F`` frames, ``H`` height, ``W`` width; videos are ``[F, 3, H, W]`` in ``[0, 1]``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from s2q.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    MOVING_PHRASES,
    SHAPES,
    SIZE_WORDS,
    SPEED_WORDS,
    STILL_PHRASES,
    SceneLabels,
    caption,
    combinations,
    render,
    sample_scene,
)


def vocabulary() -> list[str]:
    """Every word that a caption can contain, sorted."""
    phrases = " ".join(MOVING_PHRASES + STILL_PHRASES)
    for field in ("size", "speed", "colour", "shape", "motion", "background"):
        phrases = phrases.replace("{" + field + "}", " ")
    phrases += " ".join(("", *SIZE_WORDS.values(), *SPEED_WORDS.values()))
    words = phrases.replace(",", " ").split()
    return sorted({*words, "an", *SHAPES, *COLOURS, *MOTIONS, *BACKGROUNDS})


def sample_training_batch(count: int, *, generator: torch.Generator) -> tuple[Tensor, list[str]]:
    """Draw `sample_batch` of random combinations of the training split."""
    labels = combinations(held_out=False)
    picks = torch.randint(len(labels), (count,), generator=generator).tolist()
    return sample_batch([labels[i] for i in picks], generator=generator)


def sample_batch(
    labels: Sequence[SceneLabels], *, num_frames: int = 9, size: int = 32, generator: torch.Generator
) -> tuple[Tensor, list[str]]:
    """Draw videos ``[B, F, 3, H, W]``, float32 in ``[0, 1]``, of the given labels, with ``B`` captions."""
    scenes = [sample_scene(label, num_frames=num_frames, size=size, generator=generator) for label in labels]
    videos = torch.stack([render(scene, num_frames=num_frames, size=size) for scene in scenes])
    return videos, [caption(scene, generator=generator) for scene in scenes]
