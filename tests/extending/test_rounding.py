"""A rounding added from outside: one leaf with its options and mathematics, and one entry in `ROUNDINGS`."""

from dataclasses import dataclass, field
from typing import Literal

import pytest
import torch

from s2q.checkpoint import load_pipeline
from s2q.common.errors import InvalidInputError
from s2q.core.qparams import dequantize_weight
from s2q.core.schemes import PerChannel, QuantScheme
from s2q.recipes.load import load_recipe
from s2q.rounding import ROUNDINGS, Rounding, round_rtn
from s2q.run.quantize import quantize
from tiny import run_pipeline, tiny_pipeline

W4 = QuantScheme(num_bits=4, granularity=PerChannel())


# the leaf: rounding/mse.py
@dataclass(frozen=True, kw_only=True)
class MSE(Rounding):
    """Round to nearest with the clipping ratio of each output channel that has the smallest squared error.

    Attributes:
        candidates: Ratios that are tried, evenly spaced up to 1.
    """

    method: Literal["mse"] = "mse"
    candidates: int = field(default=10, metadata={"ge": 1, "le": 100})

    def round(self, weight, scheme, *, clip_ratio=None, hessian=None):
        best, least = None, None
        for step in range(self.candidates):
            rounded = round_rtn(weight, scheme, clip_ratio=1 - 0.05 * step / self.candidates * 10)
            error = (dequantize_weight(rounded.codes, rounded.scale) - weight.float()).square().sum(dim=1)
            if best is None:
                best, least = rounded, error
                continue
            better = error < least
            best.codes[better], best.scale[better], least = (
                rounded.codes[better],
                rounded.scale[better],
                least.minimum(error),
            )
        return best, {"squared_error": float(least.sum())}


@pytest.fixture(autouse=True)
def _added(monkeypatch):
    monkeypatch.setitem(ROUNDINGS, "mse", MSE)  # the edit: rounding/__init__.py


def test_a_recipe_is_validated_into_its_options():
    recipe = load_recipe("rtn-w4a8", overrides=["rounding.method=mse", "rounding.candidates=4"])
    assert recipe.rounding == MSE(candidates=4)
    assert not recipe.calibrates
    assert load_recipe(recipe.resolved()) == recipe
    assert load_recipe("s2q-w4a6").resolved()["rounding"].keys() == {
        "method", "dampening_frac", "block_size", "allow_fallback"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounding.candidates=0", "rounding.candidates=0; expected at least 1, at most 100"),
        ("rounding.candidates=many", "rounding.candidates='many': input should be a valid integer"),
        ("rounding.candidate=4", r"unknown key 'rounding\.candidate'; nearest keys are rounding\.candidates"),
        ("rounding.penalty=4", "it is an option of rounding.method=adaround; remove it"),
        ("modulation.rounding=mse", "modulation.rounding='mse'; expected one of rtn, gptq"),
    ],
)
def test_messages_name_its_options(override, message):
    with pytest.raises(InvalidInputError, match=message):
        load_recipe("rtn-w4a8", overrides=["rounding.method=mse", override])


@pytest.mark.parametrize("recipe", ["rtn-w4a16", "smoothquant-w4a8"])
def test_a_checkpoint_holds_its_weights_with_samples_and_without(tmp_path, recipe):
    pipe = tiny_pipeline("cogvideox", num_layers=1)
    small = ["calibration.n_prompts=1", "calibration.steps=1", "calibration.samples=1"]
    changes = ["rounding.method=mse", "transforms={}", *(small if recipe != "rtn-w4a16" else [])]
    quantize(pipe, recipe=recipe, out=tmp_path / "out", overrides=changes, prompts=["a red circle"])
    loaded = load_pipeline(tmp_path / "out")
    weight = pipe.transformer.transformer_blocks[0].ff.net[2].weight.detach()
    packed = loaded.transformer.transformer_blocks[0].ff.net[2].dequantized_weight(torch.float32)
    expected, _ = MSE().round(weight, W4)
    assert torch.equal(packed, dequantize_weight(expected.codes, expected.scale))
    nearest = round_rtn(weight, W4)
    errors = [(value - weight).square().sum() for value in (packed, dequantize_weight(nearest.codes, nearest.scale))]
    assert errors[0] < 0.95 * errors[1]
    assert torch.isfinite(run_pipeline(loaded)).all()
