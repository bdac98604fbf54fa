import pytest
import torch
from PIL import Image

from s2q.common.errors import InvalidInputError
from s2q.engines.options import Workers
from s2q.generation.generate import described, generate
from tiny import tiny_pipeline

IMAGE = Image.new("RGB", (16, 16), "red")
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


def test_a_prompt_with_a_seed_of_its_own_has_one_video(pipe):
    prompts = ["red", {"prompt": "blue", "seed": 7, "negative_prompt": "ugly"}]
    videos = generate(pipe, prompts=prompts, seeds=[3, 1], **SETTINGS)
    assert [(video.prompt, video.seed) for video in videos] == [("red", 3), ("red", 1), ("blue", 7)]
    assert described(videos[0]) == {"prompt": "red", "seed": 3}
    assert described(videos[2]) == {"prompt": "blue", "seed": 7, "negative_prompt": "ugly"}


def test_workers_are_planned_for_the_videos_that_there_are(pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path / "model")
    asked, planned = [], Workers.planned
    monkeypatch.setattr(
        Workers, "planned", lambda self, tasks, **limits: asked.append(tasks) or planned(self, tasks, **limits)
    )
    prompts = [{"prompt": "red", "seed": 7}, {"prompt": "blue", "seed": 1}]
    videos = generate(tmp_path / "model", prompts=prompts, seeds=range(4), **SETTINGS)
    assert asked[0] == len(videos) == 2


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
        ([{"prompt": "a", "negative_prompt": "x" * 40}], {}, "prompt 1 of 1: negative_prompt has .* tokens"),
        ([{"prompt": "a", "negative_prompt": "b"}], {"guidance_scale": 1.0}, "negative_prompt: .* without guidance"),
        (["a", {"prompt": "b", "image": IMAGE}], {}, "prompt 2 of 2: image: CogVideoXPipeline generates from text"),
        (["a"], {"num_frames": 8}, "num_frames"),
        (["a"], {"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_input_is_refused_before_the_transformer_runs(pipe, monkeypatch, prompts, options, message):
    monkeypatch.setattr(pipe.transformer, "forward", None)
    with pytest.raises(InvalidInputError, match=message):
        generate(pipe, prompts=prompts, **options)
