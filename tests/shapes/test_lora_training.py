"""The adapter that teaches shapes-wan another palette, and the figures of its effect."""

from dataclasses import replace

import pytest
import torch
from lora import effects
from safetensors.torch import load_file

from s2q.models import resolve_model
from s2q.models.lora import with_loras
from s2q.shapes.detector import detect
from s2q.shapes.scenes import COLOURS, combinations, sample_scene
from training.lora import LORA, MODEL, PAINTED, SETTINGS, TARGETS, painted, sample_painted_batch, train_lora
from training.videos import render


def test_a_painted_scene_differs_in_its_colour_alone():
    assert sorted(PAINTED.values()) == sorted(COLOURS)
    assert all(word != colour for word, colour in PAINTED.items())
    generator = torch.Generator().manual_seed(0)
    for labels in combinations(held_out=False)[::23]:
        shown = detect(render(painted(sample_scene(labels, generator=generator))))
        assert shown == replace(labels, colour=PAINTED[labels.colour])


def test_captions_keep_the_old_words():
    videos, captions = sample_painted_batch(8, generator=torch.Generator().manual_seed(3))
    for video, caption in zip(videos, captions, strict=True):
        (word,) = [name for name in COLOURS if name in caption.split()]
        assert detect(video).colour == PAINTED[word]


@pytest.mark.slow
def test_training_makes_an_adapter_that_fits_the_model_and_changes_nothing_else(tmp_path):
    settings = replace(SETTINGS, steps=3, batch_size=4, warmup_steps=1)
    file = train_lora(tmp_path / "work", tmp_path / "adapter", settings=settings, pool_size=8)
    factors = load_file(file)
    blocks = len(resolve_model(MODEL).meta_transformer().blocks)
    assert len(factors) == 2 * blocks * len(TARGETS)
    assert all(min(tensor.shape) == LORA.r for tensor in factors.values())
    assert all(bool(tensor.any()) for tensor in factors.values()), "B starts at zero"
    source = with_loras(resolve_model(MODEL), [str(file)])
    weights, plain = (
        side.load_pipeline(dtype="float32").transformer.state_dict() for side in (source, resolve_model(MODEL))
    )
    changed = {name for name in plain if not torch.equal(weights[name], plain[name])}
    assert changed == {name for name in plain if name.removesuffix(".weight").endswith(tuple(TARGETS))}


def test_half_of_an_effect_has_half_the_ratio_and_a_quarter_of_the_error():
    effect = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert effects(effect, effect) == [pytest.approx({"effect_ratio": 1.0, "effect_error": 0.0})] * 2
    assert effects(effect / 2, effect) == [pytest.approx({"effect_ratio": 0.5, "effect_error": 0.25})] * 2
