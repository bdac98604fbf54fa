"""Prompt adherence of a generated scene, by the analytic detector: is what the caption names what the video shows?

Only captions of the scene grammar say exactly what the detector can see, so a prompt that the grammar cannot parse has
no adherence, instead of a guessed one.
"""

from collections.abc import Mapping

import torch

from s2q.shapes.detector import DetectScene, detect_scene
from s2q.shapes.scenes import parse_caption

FIELDS: Mapping[str, str] = {
    "adherence_shape": "shape",
    "adherence_colour": "colour",
    "adherence_direction": "motion",
    "adherence_background": "background",
}
"""Metric to field of the scene labels."""

ADHERENCE = (*FIELDS, "adherence_all")


def adherence(prompt: str, frames: torch.Tensor, *, detect: DetectScene = detect_scene) -> dict[str, float | None]:
    """Compare what a video shows (`[F, H, W, 3]`, uint8) with what its caption says.

    Returns:
        `adherence_shape`, `adherence_colour`, `adherence_direction`, `adherence_background` and `adherence_all`:
        1.0 for a match, 0.0 for a miss, None where the caption is not of the scene grammar or does not say.
    """
    wanted = parse_caption(prompt)
    if wanted is None:
        return dict.fromkeys(ADHERENCE)
    detected = detect(frames).labels
    scores: dict[str, float | None] = {}
    for name, field in FIELDS.items():
        label = getattr(wanted, field)
        scores[name] = None if label is None else float(getattr(detected, field) == label)
    stated = [score for score in scores.values() if score is not None]
    scores["adherence_all"] = float(all(stated)) if len(stated) == len(FIELDS) else None
    return scores
