"""The scene generator: labels, captions, splits, pixels."""

import math

import pytest
import torch

from s2q.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    SceneLabels,
    all_combinations,
    caption,
    combinations,
    parse_caption,
    render,
    sample_scene,
    scene_of,
    shape_coverage,
)
from training.videos import sample_batch, vocabulary


def test_every_caption_names_its_labels_with_known_words():
    words = set(vocabulary())
    generator = torch.Generator().manual_seed(0)
    for labels in all_combinations():
        text = caption(sample_scene(labels, generator=generator), generator=generator)
        assert parse_caption(text) == labels
        assert set(text.replace(",", " ").split()) <= words
        assert "a orange" not in text


@pytest.mark.parametrize("text", ["", "a cat", "a red circle", "a red blue circle moving left on a grey background"])
def test_other_prompts_have_no_labels(text):
    assert parse_caption(text) is None


def test_captions_are_read_whatever_their_case_and_punctuation():
    labels = SceneLabels(shape="circle", colour="red", motion="left", background="grey")
    assert parse_caption("A red Circle moving left, grey background.") == labels


def test_a_scene_of_a_caption_has_all_that_the_caption_names():
    generator = torch.Generator().manual_seed(0)
    for labels in all_combinations()[::9]:
        drawn = sample_scene(labels, generator=generator)
        scene = scene_of(caption(drawn, generator=generator), generator=generator)
        assert (scene.labels, scene.size) == (labels, drawn.size)
        assert scene.speed == drawn.speed or labels.motion == "still"
    assert scene_of("a cat", generator=generator) is None


def test_held_out_split_is_balanced_and_disjoint():
    held_out, training = combinations(held_out=True), combinations(held_out=False)
    assert len(held_out) + len(training) == len(all_combinations()) == 450
    assert not set(held_out) & set(training)
    for field, names in (("shape", SHAPES), ("colour", COLOURS), ("motion", MOTIONS), ("background", BACKGROUNDS)):
        counts = [sum(getattr(labels, field) == name for labels in held_out) for name in names]
        assert set(counts) == {len(held_out) // len(names)}


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_has_the_area_of_its_circle_and_its_centroid_at_the_origin(shape):
    grid = torch.arange(64) + 0.5 - 32
    coverage = shape_coverage(shape, x=grid[None, :], y=grid[:, None], radius=12.0)
    assert float(coverage.sum()) == pytest.approx(math.pi * 144, rel=0.02)
    assert float((coverage.sum(0) * grid).sum() / coverage.sum()) == pytest.approx(0, abs=1e-3)
    assert float((coverage.sum(1) * grid).sum() / coverage.sum()) == pytest.approx(0, abs=0.05)


def test_same_seed_same_pixels_and_captions():
    labels = all_combinations()[::50]
    first = sample_batch(labels, generator=torch.Generator().manual_seed(3))
    second = sample_batch(labels, generator=torch.Generator().manual_seed(3))
    other = sample_batch(labels, generator=torch.Generator().manual_seed(4))
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1]
    assert not torch.equal(first[0], other[0])


def test_shapes_stay_inside_the_frame():
    generator = torch.Generator().manual_seed(5)
    for labels in all_combinations()[::7]:
        scene = sample_scene(labels, generator=generator)
        video = render(scene)
        border = torch.cat([video[..., 0, :], video[..., -1, :], video[..., :, 0], video[..., :, -1]], dim=-1)
        background, colour = torch.tensor(scene.background_rgb), torch.tensor(scene.colour_rgb)
        covered = (border - background[:, None]).norm(dim=1) / (colour - background).norm()
        assert float(covered.max()) < 0.5  # at most the soft outline of a corner


def test_render_scales_with_the_frame():
    labels = all_combinations()[0]
    small = sample_scene(labels, size=32, generator=torch.Generator().manual_seed(1))
    large = sample_scene(labels, size=64, generator=torch.Generator().manual_seed(1))
    shrunk = torch.nn.functional.avg_pool2d(render(large, size=64), 2)
    assert float((shrunk - render(small)).abs().mean()) < 0.02
