"""The detector's own accuracy on real renders, and its answer where there is nothing to see."""

import pytest
import torch

from s2q.shapes.detector import detect, detect_scene
from s2q.shapes.scenes import all_combinations
from training.videos import sample_batch

FIELDS = ("shape", "colour", "motion", "background")


def _accuracy(noise: float) -> dict[str, float]:
    generator = torch.Generator().manual_seed(11)
    labels = all_combinations()
    videos, _ = sample_batch(labels, generator=generator)
    videos = (videos + noise * torch.randn(videos.shape, generator=generator)).clamp(0, 1)
    found = [detect(video) for video in videos]
    return {f: sum(getattr(a, f) == getattr(b, f) for a, b in zip(found, labels, strict=True)) / 450 for f in FIELDS}


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_detector_is_right_on_at_least_99_percent_of_renders(noise):
    accuracy = _accuracy(noise)
    assert all(value >= 0.99 for value in accuracy.values()), accuracy


def test_uint8_and_float_frames_give_the_same_answer():
    videos, _ = sample_batch(all_combinations()[::60], generator=torch.Generator().manual_seed(0))
    for video in videos:
        assert detect(video) == detect((video * 255).round().byte().permute(0, 2, 3, 1))


def test_an_empty_video_has_a_background_and_nothing_else():
    found = detect(torch.full((9, 3, 32, 32), 0.5))
    assert (found.shape, found.colour, found.motion, found.background) == (None, None, None, "grey")


def test_a_reversed_video_moves_the_other_way():
    labels = [c for c in all_combinations() if c.motion != "still"][::40]
    videos, _ = sample_batch(labels, generator=torch.Generator().manual_seed(2))
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    assert [detect(v.flip(0)).motion for v in videos] == [opposite[str(c.motion)] for c in labels]


def test_an_object_travels_as_far_as_its_scene_says():
    labels = [label for label in all_combinations() if label.motion in ("right", "up")][::20]
    videos, _ = sample_batch(labels, generator=torch.Generator().manual_seed(5))
    for label, video in zip(labels, videos, strict=True):
        distance, half, back = (
            detect_scene(part).travel for part in (video, video[: len(video) // 2 + 1], video.flip(0))
        )
        axis = 0 if label.motion == "right" else 1
        assert half[axis] == pytest.approx(distance[axis] / 2, rel=0.1)
        assert back[axis] == pytest.approx(-distance[axis], rel=1e-3)
    assert detect_scene(torch.full((9, 3, 32, 32), 0.5)).travel is None
