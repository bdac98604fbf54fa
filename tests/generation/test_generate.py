import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.generation.generate import generate
from tiny import tiny_pipeline

SETTINGS = {"num_inference_steps": 2, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("cogvideox")


def test_every_prompt_and_seed_in_order_whatever_the_batches(pipe):
    whole = generate(pipe, prompts=["red", "blue"], seeds=[3, 1], **SETTINGS)
    assert [(video.prompt, video.seed) for video in whole] == [("red", 3), ("red", 1), ("blue", 3), ("blue", 1)]
    split = generate(pipe, prompts=["blue", "red"], seeds=[1, 3], **SETTINGS, batch_size=3)
    by_name = {(video.prompt, video.seed): video for video in split}
    for video in whole:
        other = by_name[video.prompt, video.seed]
        assert video.frames.shape == (9, 16, 16, 3)
        assert video.frames.dtype == torch.uint8
        torch.testing.assert_close(video.latents, other.latents, rtol=1e-4, atol=1e-5)


def test_progress_counts_every_step_of_every_batch(pipe):
    calls = []
    generate(pipe, prompts=["a", "b", "c"], **SETTINGS, batch_size=2, progress=lambda *call: calls.append(call))
    assert calls == [("generate", done, 4) for done in range(5)]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([""], {}, "empty"),
        (["x" * 40], {}, "tokens"),
        (["a"], {"seeds": [-1]}, "seed"),
        (["a"], {"num_frames": 8}, "num_frames"),
        (["a"], {"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_input_is_refused_before_the_transformer_runs(pipe, monkeypatch, prompts, options, message):
    monkeypatch.setattr(pipe.transformer, "forward", None)
    with pytest.raises(InvalidInputError, match=message):
        generate(pipe, prompts=prompts, **options)
