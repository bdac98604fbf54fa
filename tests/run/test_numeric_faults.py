"""Values that quantizers cannot work with, for every method: zeros, constants, overflow, NaN, one short sample.

A layer is named in the error, or its fallback is in the report and the checkpoint returns finite values.
"""

import json
import math
import re

import pytest
import torch
from reliability import record

from quick import quick
from s2q.checkpoint import load_pipeline
from s2q.common.errors import S2QError
from s2q.recipes.load import load_recipe
from s2q.recipes.methods import methods, recipe_names
from s2q.run.quantize import quantize
from tiny import run_transformer, tiny_pipeline

METHODS = sorted(methods())
QUICK = ("deltaquant", "orbitquant", "quarot", "s2q-export-branch", "s2q-plus")
"""Methods that differ most in how they round and what they learn; zeros are tried with every method."""

SMALL = ["calibration.n_prompts=1", "calibration.steps=1", "calibration.samples=1"]
GROUPS = ["weights.group_size=16", "activations.group_size=16", "allocation.candidates=[16,32]"]
BLOCK = "transformer_blocks.0"
FIRST, LAST = f"{BLOCK}.ff.net.0.proj", f"{BLOCK}.ff.net.2"


def name_of(method):
    """The recipe of a method at W4A4, or at its first width."""
    widths = methods()[method]["widths"]
    return f"{method}-{'w4a4' if 'w4a4' in widths else next(iter(widths))}"


def overrides_of(recipe):
    """Changes that make a recipe quick: one sample of one step, and groups that divide 64 channels."""
    changes = list(SMALL) if recipe.calibrates else []
    if recipe.allocation is not None:
        changes.append("allocation.samples=1")
    if recipe.distillation is not None:
        changes.append("distillation.epochs=1")
    if recipe.refinement is not None:
        changes.append("refinement.epochs=1")
    if recipe.name.startswith("q-dit"):
        changes += [*GROUPS, f"allocation.budget={recipe.weights.num_bits + 1.1}"]
    return changes


def run(pipe, method, out, *changes):
    recipe = load_recipe(name_of(method))
    overrides = [*overrides_of(recipe), *changes]
    prompts = ["a"] if recipe.calibrates else None
    return quantize(pipe, recipe=name_of(method), out=out, prompts=prompts, overrides=overrides)


def uses_gptq(method):
    return load_recipe(name_of(method)).rounding.method == "gptq"


CALIBRATING = [method for method in METHODS if load_recipe(name_of(method)).calibrates]


@pytest.fixture
def pipe():
    return tiny_pipeline("cogvideox", num_layers=1)


@pytest.fixture
def block(pipe):
    block = pipe.transformer.transformer_blocks[0]
    with torch.no_grad():
        yield block


def check_output(out, report):
    """The report has finite numbers alone, and the checkpoint loads and returns finite values."""
    json.dumps(report.to_dict(), allow_nan=False)
    assert math.isfinite(report.blocks[0].weight_relative_error)
    pipe = load_pipeline(out)
    assert torch.isfinite(run_transformer(pipe.transformer)).all()
    return pipe.transformer.transformer_blocks[0]


@pytest.mark.parametrize("method", METHODS)
def test_channels_and_linears_of_zeros_stay_zero(method, pipe, block, tmp_path):
    block.attn1.to_q.weight[:3] = 0
    for linear in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
        linear.weight[:, 5] = 0
    block.ff.net[0].proj.weight.zero_()
    block.ff.net[0].proj.bias.zero_()  # what ff.net.2 reads is zero
    report = run(pipe, method, tmp_path / "out")
    packed = check_output(tmp_path / "out", report)
    recipe = load_recipe(name_of(method))
    learned = 1e-3 if recipe.refinement is not None or recipe.transforms.estimator else 0  # corrections of the output
    assert packed.attn1.to_q.effective_weight(torch.float32)[:3].abs().max() <= learned
    assert packed.ff.net[0].proj.effective_weight(torch.float32).abs().max() <= learned
    if uses_gptq(method):
        rounding = report.blocks[0].rounding[LAST]
        assert rounding["fallback"] is None
        assert rounding["dead_columns"] == block.ff.net[2].in_features


@pytest.mark.parametrize("method", quick(METHODS, *QUICK))
def test_inputs_that_are_the_same_for_every_token_are_quantized(method, pipe, block, tmp_path):
    for norm in (block.norm1, block.norm2):  # scale -1, shift 0.3, gate 1, for video and text
        norm.linear.weight.zero_()
        bias = norm.linear.bias.view(6, -1)
        bias[[0, 3]], bias[[1, 4]], bias[[2, 5]] = 0.3, -1, 1
    report = run(pipe, method, tmp_path / "out")
    check_output(tmp_path / "out", report)
    for rounding in report.blocks[0].rounding.values():
        if "rtn_error" in rounding:
            assert rounding["error"] <= rounding["rtn_error"]


@pytest.mark.parametrize("method", quick([method for method in METHODS if uses_gptq(method)], *QUICK))
def test_a_singular_hessian_without_dampening_is_tried_again_or_rounded_to_nearest(method, pipe, tmp_path):
    report = run(pipe, method, tmp_path / "out", "rounding.dampening_frac=0")
    check_output(tmp_path / "out", report)
    for rounding in report.blocks[0].rounding.values():
        assert rounding["error"] <= rounding["rtn_error"]
    assert report.blocks[0].rounding[LAST]["retries"] >= 1  # fewer tokens than channels


OVERFLOWS = {"orbitquant": FIRST, "s2q-plus": LAST}  # the codebook's norm of a weight, the moments of an input
OVERFLOWS |= {
    "s2q-table": LAST,
    "s2q-export": BLOCK,
    "s2q-export-branch": BLOCK,
    "s2q-export-table": BLOCK,
}  # the loss of what refinement starts from


def overflow(block):
    """Let the squares of what ff.net.2 reads overflow float32, but not what it returns."""
    block.ff.net[0].proj.weight.mul_(1e20)
    block.ff.net[2].weight.mul_(1e-20)


@pytest.mark.parametrize("method", quick(METHODS, *QUICK))
def test_inputs_whose_squares_overflow_are_named_in_the_report_or_in_the_error(method, pipe, block, tmp_path, caplog):
    overflow(block)
    if method in OVERFLOWS:
        with pytest.raises(S2QError, match=rf"^{re.escape(OVERFLOWS[method])}: "):
            run(pipe, method, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    report = run(pipe, method, tmp_path / "out")
    check_output(tmp_path / "out", report)
    rounding = report.blocks[0].rounding.get(LAST, {})
    if rounding.get("fallback"):
        assert rounding["fallback"] == "the Hessian contains NaN or infinite values"
        assert f"{LAST}: rounded to nearest: {rounding['fallback']}" in caplog.messages


@pytest.mark.parametrize("method", ["quarot", "q-dit", "deltaquant"])
def test_overflow_falls_back_and_stops_with_the_layer_where_that_is_not_allowed(method, pipe, block, tmp_path):
    overflow(block)
    report = run(pipe, method, tmp_path / "out")
    assert [name for name, one in report.blocks[0].rounding.items() if one["fallback"]] == [LAST]
    with pytest.raises(S2QError, match=rf"{re.escape(LAST)}: gptq: the Hessian.*allow_fallback=true"):
        run(pipe, method, tmp_path / "other", "rounding.allow_fallback=false")


@pytest.mark.parametrize("method", quick(CALIBRATING, *QUICK))
def test_a_loss_that_overflows_names_the_block(method, pipe, block, tmp_path):
    block.ff.net[0].proj.weight.mul_(1e20)
    block.ff.net[2].weight.mul_(3)
    with pytest.raises(S2QError, match=rf"^{re.escape(BLOCK)}[.:]"):
        run(pipe, method, tmp_path / "out")


@pytest.mark.parametrize("bad", quick([torch.nan, torch.inf, -torch.inf], torch.inf))
@pytest.mark.parametrize("method", quick(CALIBRATING, *QUICK))
def test_values_that_are_not_finite_name_the_layer_that_returns_them_first(method, bad, pipe, block, tmp_path):
    block.ff.net[2].register_forward_hook(lambda _module, _args, output: output * bad)
    with pytest.raises(S2QError, match=rf"NaN or infinite latents for prompt 'a'.*first in transformer\.{LAST};"):
        run(pipe, method, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", quick(CALIBRATING, *QUICK))
def test_values_that_reach_no_latent_name_the_layer_too(method, pipe, block, tmp_path):
    def spoil(_module, _args, output):  # a text token; those are dropped after the last block
        output[:, 0, 0] = torch.nan

    block.ff.net[0].register_forward_hook(spoil)
    with pytest.raises(S2QError, match=rf"{BLOCK}: its encoder_hidden_states for prompt 0.*first in {BLOCK}.ff.net.0;"):
        run(pipe, method, tmp_path / "out")


def test_frames_that_are_not_finite_name_the_layer_of_the_vae(pipe):
    from s2q.generation.generate import generate

    pipe.vae.decoder.conv_out.register_forward_hook(lambda _module, _args, output: (output[0] * torch.nan, output[1]))
    with pytest.raises(S2QError, match=r"NaN or infinite frames for prompt 'b', seed 3, first in vae.decoder.conv_out"):
        generate(pipe, prompts=["b"], seeds=[3], num_frames=9, height=16, width=16, num_inference_steps=1)


def zeros(block):
    block.ff.net[0].proj.weight.zero_()
    block.ff.net[0].proj.bias.zero_()


def constants(block):
    for norm in (block.norm1, block.norm2):
        norm.linear.weight.zero_()


def nan(block):
    block.ff.net[2].register_forward_hook(lambda _module, _args, output: output * torch.nan)


FAULTS = {"zeros": zeros, "constants": constants, "overflow": overflow, "nan": nan}


@pytest.mark.faults
def test_every_width_of_every_method_ends_with_finite_values_or_a_name(tmp_path):
    counts = {fault: {"runs": 0, "finite": 0, "with_fallback": 0, "stopped_with_layer": 0} for fault in FAULTS}
    for name in recipe_names():
        recipe = load_recipe(name)
        for fault, spoil in FAULTS.items():
            if fault == "nan" and not recipe.calibrates:
                continue
            pipe, out = tiny_pipeline("cogvideox", num_layers=1), tmp_path / f"{name}-{fault}"
            with torch.no_grad():
                spoil(pipe.transformer.transformer_blocks[0])
            counts[fault]["runs"] += 1
            try:
                prompts = ["a"] if recipe.calibrates else None
                report = quantize(pipe, recipe=name, out=out, prompts=prompts, overrides=overrides_of(recipe))
            except S2QError as error:
                if BLOCK not in str(error) or fault in ("zeros", "constants"):
                    raise
                counts[fault]["stopped_with_layer"] += 1
                continue
            check_output(out, report)
            counts[fault]["finite"] += 1
            rounding = report.blocks[0].rounding.values()
            counts[fault]["with_fallback"] += any(layer.get("fallback") for layer in rounding)
    assert all(count["finite"] + count["stopped_with_layer"] == count["runs"] for count in counts.values())
    record("numeric", counts)
