"""Sana-Video beside what every family has to show: its linear attention, its arguments."""

import pytest
import torch

import s2q
from s2q.common.errors import InvalidInputError
from s2q.generation.denoise import denoise
from s2q.generation.settings import resolve_settings
from tiny import tiny_call, tiny_pipeline, video_size


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("sana-video")


def test_a_video_is_that_of_the_pipeline_called_with_the_seed(pipe):
    settings = resolve_settings(pipe, requested={**video_size(pipe), "num_inference_steps": 2})
    result = denoise(pipe, ["red"], seeds=[4], settings=settings)
    generator = torch.Generator().manual_seed(4)
    frames = pipe("red", **tiny_call(pipe), generator=generator, output_type="np").frames[0]
    by_hand = (torch.from_numpy(frames) * 255).round().to(torch.uint8)
    assert float((result.frames[0].float() - by_hand.float()).abs().max()) <= 1


def test_int8_attention_is_refused(pipe, tmp_path):
    with pytest.raises(InvalidInputError, match="attention of SanaVideoTransformer3DModel is linear.* attention=null"):
        s2q.quantize(pipe, recipe="rtn-w4a6", out=tmp_path / "out", overrides=["attention.num_bits=8"])
