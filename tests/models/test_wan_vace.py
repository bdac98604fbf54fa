"""Wan VACE beside what every family has to show: one prompt a call, hints between blocks, a block with two streams."""

import pytest
import torch

import s2q
from s2q.checkpoint import read_config
from s2q.common.hooks import capture_calls
from s2q.models import block_names, family_of
from tiny import tiny_call, tiny_pipeline, video_size

SIZE = ["calibration.num_frames=9", "calibration.height=16", "calibration.width=16"]
QUICK = ["calibration.samples=2", "calibration.steps=2", "calibration.n_prompts=1", "distillation.epochs=1", *SIZE]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("wan-vace")


def test_videos_are_generated_one_by_one_as_the_pipeline_does(pipe):
    videos = s2q.generate(
        pipe, prompts=["red", "blue"], seeds=[3], batch_size=2, num_inference_steps=2, **video_size(pipe)
    )
    frames = pipe("blue", **tiny_call(pipe), generator=torch.Generator().manual_seed(3), output_type="np").frames[0]
    by_hand = (torch.from_numpy(frames) * 255).round().to(torch.uint8)
    assert len(videos) == 2
    assert float((videos[1].frames.float() - by_hand.float()).abs().max()) <= 1


def test_hints_are_in_the_inputs_of_the_blocks_after_them(pipe):
    """What a block returns is not what the next one is called with."""
    transformer = pipe.transformer
    first, second = transformer.blocks
    returned = []
    handle = first.register_forward_hook(lambda _module, _args, output: returned.append(output))
    with capture_calls(second) as calls:
        pipe("red", **tiny_call(pipe), output_type="latent")
    handle.remove()
    assert not torch.equal(calls[0][0][0], returned[0])
    assert not family_of(transformer).chained
    assert block_names(transformer, family_of(transformer)) == [
        "vace_blocks.0",
        "vace_blocks.1",
        "blocks.0",
        "blocks.1",
    ]


@pytest.mark.parametrize("quantized", ["proj_out", "ffn.net.2"])
def test_the_loss_of_a_block_of_the_control_stream_has_its_hint_and_its_stream(pipe, tmp_path, quantized):
    """The linear behind the hint alone is quantized; or one before it, which is in both."""
    pipe.save_pretrained(tmp_path / "model")
    inner = {name.split(".", 2)[2] for name in linear_names(pipe) if name.startswith("vace_blocks")}
    skip = ["blocks.*", *(f"vace_blocks.*.{name}" for name in inner - {quantized})]
    report = s2q.quantize(
        tmp_path / "model",
        recipe="s2q-w4a6",
        prompts=["red"],
        out=tmp_path / "out",
        overrides=[*QUICK, "outer=null", f"skip={skip}"],
    )
    assert set(read_config(tmp_path / "out").layers) == {f"vace_blocks.{index}.{quantized}" for index in (0, 1)}
    assert all(0 < block.loss["final"] < block.loss["rtn"] for block in report.blocks if "rtn" in block.loss)


def linear_names(pipe):
    return [name for name, module in pipe.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
