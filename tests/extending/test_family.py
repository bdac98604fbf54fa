"""A family from outside the package: one file of constants, one entry of `FAMILIES`."""

import pytest
import torch
from diffusers import SkyReelsV2Pipeline, SkyReelsV2Transformer3DModel

import s2q
import tiny_families
from extending.skyreels_v2 import SKYREELS_V2
from s2q.common.errors import InvalidInputError
from s2q.models import FAMILIES
from tiny import tiny_pipeline

SETTINGS = [
    "calibration.n_prompts=1",
    "calibration.steps=2",
    "calibration.samples=2",
    "calibration.num_frames=9",
    "calibration.height=16",
    "calibration.width=16",
    "distillation.epochs=1",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    transformer = SkyReelsV2Transformer3DModel(**tiny_families.FAMILIES["wan"].config)
    wan = {name: part for name, part in tiny_pipeline("wan").components.items() if name != "transformer_2"}
    path = tmp_path_factory.mktemp("skyreels")
    SkyReelsV2Pipeline(**wan | {"transformer": transformer.eval()}).save_pretrained(path)
    return path


def test_without_its_entry_the_class_is_refused(folder):
    with pytest.raises(InvalidInputError, match="SkyReelsV2Transformer3DModel.*not supported"):
        s2q.plan(folder, recipe="s2q-w4a6")


def test_its_checkpoint_loads_and_generates(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, SKYREELS_V2.transformer_class, SKYREELS_V2)
    report = s2q.quantize(folder, recipe="s2q-w4a6", prompts=["a"], out=tmp_path / "out", overrides=SETTINGS)
    assert len(report.blocks) == 2
    assert all(block.loss["final"] < block.loss["rtn"] for block in report.blocks)
    pipe = SkyReelsV2Pipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    (video,) = pipe(prompt="a", num_frames=9, height=16, width=16, num_inference_steps=2, output_type="pt").frames
    assert bool(torch.isfinite(video).all())
    assert s2q.inspect(tmp_path / "out").storage["ratio"] > 1
