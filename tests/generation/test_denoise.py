import pytest
import torch

from s2q.common.errors import S2QError
from s2q.generation.denoise import denoise, initial_noise
from s2q.generation.settings import resolve_settings
from tiny import run_pipeline, tiny_pipeline

SETTINGS = {"num_inference_steps": 3, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("cogvideox rotary")


def test_a_video_does_not_depend_on_its_batch(pipe):
    settings = resolve_settings(pipe, requested=SETTINGS)
    prompts, seeds = ["red circle", "a blue box", "red circle"], [0, 0, 5]
    together = denoise(pipe, prompts, seeds=seeds, settings=settings)
    for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        alone = denoise(pipe, [prompt], seeds=[seed], settings=settings)
        torch.testing.assert_close(alone.latents[0], together.latents[index], rtol=1e-4, atol=1e-5)
        assert (alone.frames[0].int() - together.frames[index].int()).abs().max() <= 1
    difference = (together.latents[0] - together.latents[2]).norm()
    assert difference > 0.1, "another seed gives another video"
    assert (together.latents[0] - together.latents[1]).norm() > 1e-3, "another prompt gives another video"


def test_equals_a_plain_pipeline_call(pipe):
    settings = resolve_settings(pipe, requested=SETTINGS)
    ours = denoise(pipe, ["red circle"], seeds=[4], settings=settings)
    plain = run_pipeline(pipe, prompt="red circle", seed=4, **SETTINGS)
    assert ours.frames.shape == (1, 9, 16, 16, 3)
    expected = (plain * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2)
    apart = (ours.frames.int() - expected.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 0.01, "rounded to the nearest value, not down"


def test_noise_is_the_same_in_every_dtype(pipe):
    settings = resolve_settings(pipe)
    noise, _ = initial_noise(pipe, 3, settings)
    half, _ = initial_noise(tiny_pipeline("cogvideox", dtype=torch.bfloat16), 3, settings)
    assert noise.dtype == half.dtype == torch.float32
    assert torch.equal(noise, half)


def test_steps_are_counted_and_the_progress_bar_is_left_as_it_was(pipe):
    settings = resolve_settings(pipe, requested=SETTINGS)
    pipe.set_progress_bar_config(disable=True, desc="mine")
    ticks = []
    result = denoise(pipe, ["a"], seeds=[0], settings=settings, decode=False, step_done=lambda: ticks.append(1))
    assert len(ticks) == 3
    assert result.frames is None
    assert pipe._progress_bar_config == {"disable": True, "desc": "mine"}


def test_nan_is_an_error_that_names_the_video():
    pipe = tiny_pipeline("cogvideox")
    with torch.no_grad():
        pipe.transformer.proj_out.weight.fill_(float("nan"))
    with pytest.raises(S2QError, match="prompt 'a', seed 2"):
        denoise(pipe, ["a"], seeds=[2], settings=resolve_settings(pipe, requested=SETTINGS))
