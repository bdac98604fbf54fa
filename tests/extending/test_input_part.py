"""A part of the input path from outside the package: its arithmetic, an entry of `PARTS` and one of `PLANNED_PARTS`."""

import pytest
import torch
from diffusers import CogVideoXPipeline

import s2q
from extending.token_mean import TOKEN_MEAN
from s2q.core.input_path import PARTS
from s2q.core.stored_form import file_form
from s2q.nn import PackedLinear, set_backend
from s2q.planning.resolve import PLANNED_PARTS
from tiny import run_pipeline, tiny_pipeline


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(PARTS, "token_mean", TOKEN_MEAN)
    monkeypatch.setitem(PLANNED_PARTS, "token_mean", lambda recipe, plan: plan.scheme.activation is not None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "model"
    tiny_pipeline("cogvideox").save_pretrained(path)
    return path


@pytest.mark.parametrize("recipe", ["rtn-w4a6", "s2q-w4a6", "s2q-plus-w4a6"])
def test_a_checkpoint_with_it_loads_and_generates(folder, tmp_path, recipe):
    small = ["n_prompts=1", "steps=2", "samples=2", "num_frames=9", "height=16", "width=16"]
    calibrated = [f"calibration.{setting}" for setting in small] + ["distillation.epochs=1"]
    calibrated += ["refinement.epochs=1"] if recipe == "s2q-plus-w4a6" else []
    report = s2q.quantize(
        folder,
        recipe=recipe,
        prompts=["a red circle"],
        out=tmp_path / "out",
        overrides=() if recipe == "rtn-w4a6" else calibrated,
    )
    planned = {layer["name"]: layer["bytes"] for layer in report.layers}
    pipe = CogVideoXPipeline.from_pretrained(tmp_path / "out")
    linears = {name: module for name, module in pipe.transformer.named_modules() if isinstance(module, PackedLinear)}
    with_part = {name: linear for name, linear in linears.items() if linear.scheme.activation is not None}
    assert with_part
    for name, linear in with_part.items():
        assert linear.row_sums.shape == (linear.out_features, 1)
        weight = linear.dequantized_weight(torch.float32)
        assert (linear.row_sums - weight.sum(dim=1, keepdim=True)).norm() < 0.5 * linear.row_sums.norm() + 1
        assert planned[name] == sum(tensor.nbytes for tensor in file_form(linear.state_dict()).values())
    assert s2q.inspect(tmp_path / "out").layers
    video = run_pipeline(pipe)
    assert bool(torch.isfinite(video).all())
    set_backend(pipe.transformer, "reference")
    torch.testing.assert_close(run_pipeline(pipe), video, atol=2e-2, rtol=0)


def test_a_constant_added_to_every_channel_costs_no_accuracy(folder, tmp_path):
    s2q.quantize(folder, recipe="rtn-w4a6", out=tmp_path / "out")
    pipe = CogVideoXPipeline.from_pretrained(tmp_path / "out")
    linear = next(m for m in pipe.transformer.modules() if isinstance(m, PackedLinear) and m.scheme.activation)
    x = torch.randn(32, linear.in_features, generator=torch.Generator().manual_seed(0))
    shifted = linear(x + 40) - linear(x)
    expected = 40 * linear.row_sums.float().T
    assert (shifted - expected).norm() < 0.02 * expected.norm()
