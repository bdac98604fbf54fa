"""Speed of the object in a generated scene, by the analytic detector, relative to full precision."""

import torch

from s2q.shapes.detector import DetectScene, detect_scene, is_still
from s2q.shapes.scenes import parse_caption

SPEED = "speed_ratio"


def speed_ratio(
    prompt: str, frames: torch.Tensor, reference: torch.Tensor, *, detect: DetectScene = detect_scene
) -> float | None:
    """Return how far the object travels along the reference's direction, divided by how far that travels.

    Args:
        prompt: The caption of both videos.
        frames: The video, uint8 [F, H, W, 3].
        reference: That of full precision, as `frames`.

    Returns:
        1 at the same speed, below 0 in the opposite direction; None where the caption is not of the scene grammar, a
        video shows no object, or the reference's object does not move.
    """
    if parse_caption(prompt) is None:
        return None
    distance, base = detect(frames).travel, detect(reference).travel
    if distance is None or base is None or is_still(base, side=max(reference.shape[1:3])):
        return None
    return (distance[0] * base[0] + distance[1] * base[1]) / (base[0] ** 2 + base[1] ** 2)
