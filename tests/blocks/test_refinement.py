"""Learning once more after rounding, as a part of a run."""

import pytest
import torch
from safetensors.torch import load_file

from overrides import overriding
from s2q.common.errors import InvalidInputError
from s2q.planning import plan
from s2q.recipes.load import load_recipe
from s2q.run.quantize import quantize
from tiny import tiny_pipeline

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
SMALL = ["calibration.steps=2", "calibration.samples=3", "calibration.n_prompts=2"]
LEARNED = ("weight_scale", "bias", "low_rank_weight", "activation_clip")


def refined(out, *changes, recipe="s2q-plus-w4a4", epochs=3):
    distilled = [] if "distillation=null" in changes else ["distillation.epochs=1"]
    overrides = overriding([*SMALL, *distilled, f"refinement.epochs={epochs}"], changes)
    return quantize(
        tiny_pipeline("cogvideox", num_layers=1), recipe=recipe, out=out, prompts=["a", "b"], overrides=overrides
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    return out, refined(out)


def test_the_loss_falls_and_the_report_says_how(run):
    (block,) = run[1].blocks
    assert set(block.loss) == {"rtn", "initial", "distilled", "rounded", "refined", "final"}
    assert block.loss["refined"] < block.loss["rounded"]
    assert block.loss["final"] == pytest.approx(block.loss["refined"], rel=0.05)  # bf16 and integers
    assert block.refinement["epochs"] == 3


def test_codes_are_those_of_the_run_without_it(run, tmp_path):
    quantize(
        tiny_pipeline("cogvideox", num_layers=1),
        recipe="s2q-plus-w4a4",
        out=tmp_path / "without",
        prompts=["a", "b"],
        overrides=[*SMALL, "distillation.epochs=1", "refinement=null"],
    )
    plain, after = load_file(tmp_path / "without" / WEIGHTS), load_file(run[0] / WEIGHTS)
    assert plain.keys() == after.keys()
    packed = {name.rpartition(".")[0] for name in plain if name.endswith("activation_clip")}
    changed = {name for name in plain if not torch.equal(plain[name], after[name])}
    assert changed == {f"{name}.{part}" for name in packed for part in LEARNED}


def test_two_runs_are_bit_identical(run, tmp_path):
    refined(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (run[0] / WEIGHTS).read_bytes()


def test_it_needs_no_distillation_and_no_gptq(tmp_path):
    report = refined(
        tmp_path / "out",
        "distillation=null",
        "clip.activations=false",
        "clip.weights=false",
        "loss.weighting=uniform",
        "rounding.method=rtn",
        "transforms.rotation=hadamard",
    )
    (block,) = report.blocks
    assert block.loss["refined"] < block.loss["rounded"]
    assert block.distillation is None


def test_it_calibrates_and_is_planned_with_gradients():
    nearest = load_recipe("rtn-w4a6", overrides=["refinement.epochs=1"])
    assert nearest.calibrates
    quarot, learned = (
        plan("shapes-cogvideox", recipe="quarot-w4a4", overrides=one) for one in ([], ["refinement.epochs=1"])
    )
    assert learned.calibration.step_bytes > quarot.calibration.step_bytes


def test_bad_settings_are_refused():
    with pytest.raises(InvalidInputError, match="refinement.epochs=0; expected at least 1"):
        load_recipe("s2q-w4a4", overrides=["refinement.epochs=0"])
    with pytest.raises(InvalidInputError, match="unknown key 'refinement.epoch'"):
        load_recipe("s2q-w4a4", overrides=["refinement.epoch=1"])
