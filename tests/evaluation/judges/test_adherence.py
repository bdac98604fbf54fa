import pytest
import torch

from s2q.evaluation.judges.adherence import ADHERENCE, adherence
from s2q.shapes.scenes import SceneLabels, render, sample_scene

RED_LEFT = SceneLabels(shape="circle", colour="red", motion="left", background="grey")
CAPTION = "a red circle moving left on a grey background"


def frames_of(labels: SceneLabels) -> torch.Tensor:
    scene = sample_scene(labels, generator=torch.Generator().manual_seed(0))
    return (render(scene) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def test_a_faithful_video_scores_everywhere():
    scores = adherence(CAPTION, frames_of(RED_LEFT))
    assert set(scores) == set(ADHERENCE)
    assert set(scores.values()) == {1.0}


@pytest.mark.parametrize(
    ("field", "value", "missed"),
    [
        ("shape", "square", "shape"),
        ("colour", "blue", "colour"),
        ("motion", "up", "direction"),
        ("background", "black", "background"),
    ],
)
def test_one_wrong_property_is_seen_and_spoils_all(field, value, missed):
    shown = SceneLabels(**{**vars(RED_LEFT), field: value})
    scores = adherence(CAPTION, frames_of(shown))
    assert {name for name, score in scores.items() if score == 0.0} == {f"adherence_{missed}", "adherence_all"}


def test_other_prompts_have_no_adherence():
    assert set(adherence("a cat on a mat", frames_of(RED_LEFT)).values()) == {None}


def test_an_empty_video_shows_no_shape():
    scores = adherence(CAPTION, torch.full((9, 32, 32, 3), 128, dtype=torch.uint8))
    assert scores["adherence_shape"] == scores["adherence_all"] == 0.0
    assert scores["adherence_background"] == 1.0
