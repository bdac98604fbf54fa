"""What is particular to HunyuanVideo 1.5: a guider, two text encoders, channels of an image behind the latent's."""

from dataclasses import replace

import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance, SkipLayerGuidance

from s2q.calibration.candidates import prepare
from s2q.calibration.teacher import load_teacher
from s2q.common.errors import InvalidInputError
from s2q.generation.denoise import denoise
from s2q.generation.settings import resolve_settings
from s2q.generation.trajectory import record_trajectory
from s2q.recipes.load import load_recipe
from tiny import tiny_pipeline

SIZE = {"num_frames": 9, "height": 16, "width": 16}
SIZES = {**SIZE, "num_inference_steps": 2}


@pytest.fixture
def pipe():
    return tiny_pipeline("hunyuanvideo 1.5")


def test_sizes_are_the_configuration_s_and_guidance_the_guider_s(pipe):
    found = resolve_settings(pipe, requested={"num_frames": 9})
    assert (found.height, found.width) == (480, 848)
    assert found.guidance_scale == 5.0
    pipe.transformer.register_to_config(target_size=64)
    assert resolve_settings(pipe, requested={"num_frames": 9}).width == 80
    pipe.guider = ClassifierFreeGuidance(guidance_scale=3.0, enabled=False)
    assert resolve_settings(pipe).guidance_scale == 1.0  # as in a distilled model


@pytest.mark.parametrize(
    "guider",
    [
        ClassifierFreeGuidance(start=0.1),
        ClassifierFreeGuidance(stop=0.9),
        ClassifierFreeGuidance(use_original_formulation=True),
        SkipLayerGuidance(skip_layer_guidance_layers=[0], stop=1.0),
    ],
)
def test_other_guidance_is_refused(pipe, guider):
    pipe.guider = guider
    with pytest.raises(InvalidInputError, match=rf"its guider, a {type(guider).__name__}, is not plain"):
        resolve_settings(pipe, requested=SIZES)


def test_the_guidance_weight_reaches_the_guider_which_is_left_as_it_was(pipe):
    before = dict(vars(pipe.guider))
    latents, branches = {}, {}
    for weight in (0.5, 1.0, 2.0, 5.0):
        settings = resolve_settings(pipe, requested=SIZES | {"guidance_scale": weight})
        trajectory = record_trajectory(pipe, ['a "red" circle'], seeds=[0], settings=settings)
        latents[weight], branches[weight] = trajectory.latents, trajectory.branches(trajectory.calls[0])
    assert vars(pipe.guider) == before
    assert "step" not in vars(pipe.scheduler)
    assert branches == {0.5: 1, 1.0: 1, 2.0: 2, 5.0: 2}
    assert torch.equal(latents[0.5], latents[1.0])
    assert not torch.equal(latents[2.0], latents[5.0])
    generator = torch.Generator().manual_seed(0)
    own = pipe('a "red" circle', **SIZES, generator=generator, output_type="latent").frames
    torch.testing.assert_close(latents[5.0], own)


def test_steps_are_heard_and_latents_are_the_last_ones(pipe):
    ticks = []
    settings = resolve_settings(pipe, requested=SIZES)
    result = denoise(pipe, ["red", "blue"], seeds=[0, 1], settings=settings, step_done=lambda: ticks.append(1))
    assert len(ticks) == 2
    assert result.frames.shape == (2, 9, 16, 16, 3)
    assert not pipe.vae.use_slicing
    alone = denoise(pipe, ["blue"], seeds=[1], settings=settings)
    torch.testing.assert_close(result.latents[1:], alone.latents)
    assert (result.frames[1:].int() - alone.frames.int()).abs().max() <= 1


def test_words_in_quotation_marks_are_recorded_too(pipe):
    settings = resolve_settings(pipe, requested=SIZES)
    call = record_trajectory(pipe, ['a "red" circle'], seeds=[0], settings=settings).calls[0]
    without, glyphs = call.inputs["encoder_attention_mask_2"]
    assert glyphs.sum() > 0
    assert without.sum() == 0
    assert call.inputs["hidden_states"].shape[1:] == (9, 3, 2, 2)
    assert call.output.shape[1:] == (4, 3, 2, 2)


def change_of(pipe, change):
    recipe = load_recipe("s2q-w4a6", overrides=["calibration.samples=2", "calibration.steps=2"])
    fingerprints = []
    for _ in range(2):
        teacher = load_teacher(pipe, recipe, dtype=None)
        inputs = prepare(teacher, ["red"], replace(recipe.calibration, **SIZE, steps=2), seed=0, inputs={})
        fingerprints.append(inputs.fingerprint)
        change()
    return fingerprints[0] != fingerprints[1]


def test_collected_videos_are_those_of_both_text_encoders_and_the_guider(pipe):
    assert not change_of(pipe, lambda: None)
    with torch.no_grad():
        assert change_of(pipe, lambda: pipe.text_encoder_2.shared.weight.add_(1))
    assert change_of(pipe, lambda: pipe.guider.register_to_config(guidance_rescale=0.5))
