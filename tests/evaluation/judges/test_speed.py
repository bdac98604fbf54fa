"""The speed of a scene's object against that of the reference."""

import pytest
import torch

from s2q.evaluation import video_metrics
from s2q.evaluation.judges.speed import speed_ratio
from s2q.generation.generate import Video
from s2q.shapes.detector import detect_scene
from s2q.shapes.scenes import SceneLabels
from training.videos import sample_batch

CAPTION = "a red circle moving right on a black background"


def scene(motion: str) -> torch.Tensor:
    """Return a video of a red circle, uint8 [F, H, W, 3]."""
    labels = SceneLabels(shape="circle", colour="red", motion=motion, background="black")
    videos, _ = sample_batch([labels], generator=torch.Generator().manual_seed(3))
    return (videos[0] * 255).round().byte().permute(0, 2, 3, 1)


def test_speed_is_relative_to_the_reference():
    video = scene("right")
    slow = video[torch.arange(len(video)) // 2]
    assert speed_ratio(CAPTION, video, video) == pytest.approx(1.0)
    assert speed_ratio(CAPTION, slow, video) == pytest.approx(0.5, rel=0.1)
    assert speed_ratio(CAPTION, video.flip(0), video) == pytest.approx(-1.0, rel=1e-3)
    assert abs(speed_ratio(CAPTION, scene("up"), video)) < 0.1


def test_the_detector_sees_each_video_once_for_speed_and_adherence(monkeypatch):
    seen = []
    monkeypatch.setattr(video_metrics, "detect_scene", lambda frames: seen.append(id(frames)) or detect_scene(frames))
    video, base = (
        Video(prompt=CAPTION, seed=0, frames=scene(motion), latents=torch.ones(1)) for motion in ("right", "up")
    )
    names = ("speed_ratio", "adherence_all", "adherence_direction")
    values = video_metrics.compare_videos(video, base, names=names)
    assert sorted(seen) == sorted([id(video.frames), id(base.frames)])
    assert abs(values.pop("speed_ratio")) < 0.1
    assert values == {
        "adherence_all": 1.0,
        "adherence_direction": 1.0,
        "reference_adherence_all": 0.0,
        "reference_adherence_direction": 0.0,
    }


def test_no_speed_without_an_object_that_moves():
    video, nothing = scene("right"), torch.zeros(9, 32, 32, 3, dtype=torch.uint8)
    assert speed_ratio(CAPTION, nothing, video) is None
    assert speed_ratio(CAPTION, video, nothing) is None
    assert speed_ratio(CAPTION, video, scene("still")) is None
    assert speed_ratio("a cat on a skateboard", video, video) is None
