"""A rounding from outside the package: one leaf, one entry of `ROUNDINGS`."""

import pytest
import torch
from diffusers import CogVideoXPipeline

import s2q
from extending.mse_rounding import MSE
from s2q.common.errors import InvalidInputError
from s2q.core.qparams import dequantize_weight
from s2q.core.schemes import PerChannel, PerGroup, QuantScheme
from s2q.recipes import load_recipe
from s2q.rounding import ROUNDINGS, round_rtn
from tiny import run_pipeline, tiny_pipeline


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(ROUNDINGS, "mse", MSE)


@pytest.mark.parametrize("granularity", [PerChannel(), PerGroup(group_size=16)])
def test_the_error_is_at_most_that_of_rounding_to_nearest(granularity):
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0)) ** 3
    scheme = QuantScheme(num_bits=4, granularity=granularity)
    ((rounded, report),) = MSE().round([weight], scheme, clip_ratios=[None])
    nearest = round_rtn(weight, scheme)
    error = (dequantize_weight(rounded.codes, rounded.scale) - weight).square().sum()
    assert error < (dequantize_weight(nearest.codes, nearest.scale) - weight).square().sum()
    assert report["squared_error"] == pytest.approx(float(error), rel=1e-5)


def test_a_recipe_is_validated_into_its_options():
    recipe = load_recipe("rtn-w4a8", overrides=["rounding.method=mse", "rounding.steps=4"])
    assert recipe.rounding == MSE(steps=4)
    assert not recipe.calibrates
    assert load_recipe(recipe.resolved()) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounding.steps=1", "rounding.steps=1; expected at least 2, at most 100"),
        ("rounding.steps=many", "rounding.steps='many': input should be a valid integer"),
        ("rounding.step=4", r"unknown key 'rounding\.step'; nearest keys are rounding\.steps"),
        ("rounding.penalty=4", "it is an option of rounding.method=adaround; set that method, or remove the key"),
        ("modulation.rounding=mse", "modulation.rounding='mse'; expected one of rtn, gptq"),
    ],
)
def test_messages_name_its_options(override, message):
    with pytest.raises(InvalidInputError, match=message):
        load_recipe("rtn-w4a8", overrides=["rounding.method=mse", override])


@pytest.mark.parametrize("recipe", ["rtn-w4a6", "vidit-q-w4a6"])
def test_a_checkpoint_rounded_by_it_loads_and_generates(tmp_path, recipe):
    settings = ["calibration.n_prompts=1", "calibration.steps=2", "calibration.samples=2"]
    size = ["calibration.num_frames=9", "calibration.height=16", "calibration.width=16"]
    errors = {}
    for method in ("rtn", "mse"):
        report = s2q.quantize(
            tiny_pipeline("cogvideox"),
            recipe=recipe,
            prompts=["a red circle"],
            out=tmp_path / method,
            overrides=[f"rounding.method={method}", *(settings + size if recipe != "rtn-w4a6" else [])],
        )
        errors[method] = sum(block.weight_relative_error for block in report.blocks)
    assert errors["mse"] < errors["rtn"]
    video = run_pipeline(CogVideoXPipeline.from_pretrained(tmp_path / "mse"))
    assert bool(torch.isfinite(video).all())
