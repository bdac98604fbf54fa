"""Recipes with tables: the data-free one, on integer kernels and the same from outlier channels, and that of s2q."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from quick import quick
from s2q.calibration import teacher
from s2q.checkpoint import inspect_checkpoint, load_pipeline
from s2q.common.errors import InvalidInputError, UsageError
from s2q.nn import PackedLinear
from s2q.planning import plan
from s2q.recipes.load import load_recipe
from s2q.run.quantize import quantize
from tiny import run_pipeline, tiny_pipeline


def adaln_rows(transformer, timestep):
    """What its adaLN linears read at a timestep, heard in a call of the transformer."""
    rows, linear = [], transformer.transformer_blocks[0].norm1.linear
    handle = linear.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0]))
    latents, text = torch.zeros(1, 2, 4, 4, 4), torch.zeros(1, 16, 32)
    with torch.no_grad():
        transformer(latents, text, timestep, ofs=torch.full((1,), 2.0))
    handle.remove()
    return rows[0]


NAMES = ["table-w4a8", "table-w4a16"]


@pytest.mark.parametrize("name", NAMES)
def test_it_needs_no_samples_and_no_simulation(name):
    recipe = load_recipe(name)
    assert not recipe.calibrates
    planned = plan("shapes-cogvideox", recipe=recipe)
    assert (planned.calibration, planned.simulated) == (None, False)


@pytest.mark.parametrize("family", ["cogvideox", "wan"])
def test_a_checkpoint_loads_and_gives_what_its_weights_give(tmp_path, family):
    pipe = tiny_pipeline(family)
    report = quantize(pipe, recipe="table-w4a8", out=tmp_path / "out")
    assert (
        inspect_checkpoint(tmp_path / "out", verify=True).storage["quantized_bytes"]
        == (report.storage["quantized_bytes"])
    )
    loaded = load_pipeline(tmp_path / "out")
    stored = load_file(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors")
    groups = [name for name in stored if name.endswith("weight_group_scale")]
    assert groups
    assert all(stored[name].dtype == torch.int8 for name in groups)
    found, full = run_pipeline(loaded), run_pipeline(pipe)
    assert float((found - full).norm() / full.norm()) < 0.2
    assert max(report.blocks[0].layers.values()) < 0.008


SHORT = ["calibration.n_prompts=2", "calibration.steps=2", "calibration.samples=4", "calibration.num_frames=9"]
SHORT += ["calibration.height=16", "calibration.width=16", "distillation.epochs=2", "refinement.epochs=1"]


@pytest.mark.parametrize("family", quick(["cogvideox", "wan"], "cogvideox"))
def test_calibrated_tables_load_and_give_what_was_learned(tmp_path, family):
    pipe, out = tiny_pipeline(family), tmp_path / "out"
    report = quantize(pipe, recipe="s2q-table-w4a8", out=out, prompts=["a", "b"], overrides=SHORT)
    for block in report.blocks:
        assert max(block.loss["rounded"], block.loss["final"]) < 0.1 * block.loss["rtn"]
        assert all(rounding["error"] < 0.8 * rounding["rtn_error"] for rounding in block.rounding.values())
    loaded = load_pipeline(out)
    packed = [layer for layer in loaded.transformer.modules() if isinstance(layer, PackedLinear)]
    assert not any(layer.simulated for layer in packed)
    assert any(layer.weight_group_scale is not None and layer.low_rank_weight is not None for layer in packed)
    found, full = run_pipeline(loaded), run_pipeline(pipe)
    assert float((found - full).norm() / full.norm()) < 0.2


def test_without_quantized_inputs_it_is_a_recipe_too(tmp_path):
    pipe = tiny_pipeline("wan")
    report = quantize(pipe, recipe="s2q-table-w4a16", out=tmp_path / "out", prompts=["a", "b"], overrides=SHORT)
    assert report.blocks[0].loss["final"] < 0.1 * report.blocks[0].loss["rtn"]


def test_samples_are_refused_as_it_does_not_calibrate(tmp_path):
    with pytest.raises(UsageError, match=r"table-w4a8 uses no calibration samples; remove --samples"):
        quantize(tiny_pipeline("cogvideox"), recipe="table-w4a8", samples=4, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["clip.weights=true", "distillation.epochs=1"], r"clip\.weights=true does not support weights\.levels=table"),
        (["rounding.method=adaround", "distillation.epochs=1"], "rounds to uniform levels; set weights.levels=uniform"),
        (["weights.num_bits=5"], "expected at most 4"),
        (["weights.num_bits=3"], "expected weights of 4 bits in groups"),
        (["activations.levels=table"], "levels=table with num_bits=8; expected at most 4"),
    ],
)
def test_options_that_a_table_does_not_support_are_refused_in_a_line(overrides, message):
    with pytest.raises(InvalidInputError, match=message) as error:
        recipe = load_recipe("table-w4a8", overrides=overrides)
        recipe.linear_scheme()
    assert "\n" not in str(error.value).strip()


@pytest.mark.parametrize("ofs", [False, True])
def test_biases_of_adaln_linears_are_corrected_at_their_mean_input(tmp_path, ofs):
    pipe = tiny_pipeline("cogvideox", num_layers=1)
    if ofs:  # as CogVideoX 1.5 image-to-video
        config = pipe.transformer.config
        pipe.transformer = type(pipe.transformer)(**config | {"ofs_embed_dim": config["time_embed_dim"]}).eval()
    full = copy.deepcopy(pipe.transformer)
    rows = torch.cat([adaln_rows(full, torch.tensor([float(step)])) for step in range(0, 1000, 10)])
    name = "transformer_blocks.0.norm1.linear"
    dense, errors = full.get_submodule(name), {}
    for corrected in (True, False):
        out = tmp_path / str(corrected)
        quantize(pipe, recipe="table-w4a8", out=out, overrides=[f"modulation.correct_bias={str(corrected).lower()}"])
        packed = load_pipeline(out).transformer.get_submodule(name)
        errors[corrected] = packed(rows) - dense(rows)
    assert float(errors[True].mean(dim=0).norm()) < 1e-3 * float(errors[False].mean(dim=0).norm())
    assert float(errors[True].norm()) < 0.7 * float(errors[False].norm())


def test_the_mean_input_is_computed_once_by_the_run_and_once_by_its_worker(tmp_path, monkeypatch):
    calls, mean_row = [], teacher.mean_timestep_row
    monkeypatch.setattr(teacher, "mean_timestep_row", lambda module: calls.append(module) or mean_row(module))
    quantize(tiny_pipeline("cogvideox", num_layers=4), recipe="table-w4a8", out=tmp_path / "out")
    assert len(calls) == 2


def test_gptq_and_a_corrected_bias_exclude_each_other():
    with pytest.raises(InvalidInputError, match=r"modulation.*correct_bias=true with rounding=gptq; use rtn"):
        load_recipe("s2q-w4a6", overrides=["modulation.correct_bias=true"])
