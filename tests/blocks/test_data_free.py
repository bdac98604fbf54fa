"""Recipes that need no samples: OrbitQuant, coded again here, and what other parts do without samples and with them."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from s2q.checkpoint import inspect_checkpoint, load_pipeline
from s2q.common.errors import InvalidInputError
from s2q.core.codebook import lloyd_max_levels
from s2q.planning import plan
from s2q.recipes.load import load_recipe
from s2q.run.quantize import quantize
from tiny import run_pipeline, tiny_pipeline

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
WIDTHS = ("w8a8", "w4a8", "w4a6", "w4a4")
SIBLINGS = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
SAMPLES = ["calibration.n_prompts=1", "calibration.steps=1", "calibration.samples=1"]


def run(out, *, recipe="orbitquant-w4a4", overrides=(), pipe=None, **arguments):
    pipe = tiny_pipeline("cogvideox", num_layers=1) if pipe is None else pipe
    return quantize(pipe, recipe=recipe, out=out, overrides=overrides, **arguments)


@pytest.fixture(scope="module")
def orbit(tmp_path_factory):
    out = tmp_path_factory.mktemp("orbit") / "out"
    report = run(out)
    return SimpleNamespace(out=out, report=report, pipe=load_pipeline(out), weights=load_file(out / WEIGHTS))


def rounded(weight, scale):
    """4 bits: the level nearest to each value over its row's scale, by search, in double."""
    levels = torch.tensor(lloyd_max_levels(4, weight.shape[1]), dtype=torch.float64)
    scale = scale.unsqueeze(1)
    return levels[((weight / scale)[..., None] - levels).abs().argmin(dim=-1)] * scale


def test_rows_are_rotated_and_go_to_the_nearest_levels(orbit):
    full = tiny_pipeline("cogvideox", num_layers=1).transformer.transformer_blocks[0]
    block = orbit.pipe.transformer.transformer_blocks[0]
    for name in (*SIBLINGS, "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"):
        packed, weight = block.get_submodule(name), full.get_submodule(name).weight.detach().double()
        assert packed.scheme.name == "w4ca4c"
        assert set(packed.transform_scale.tolist()) == {-1.0, 1.0}
        matrix = torch.kron(packed.transform_left.double(), packed.transform_right.double())
        eye = torch.eye(len(matrix), dtype=torch.float64)  # up to the rounding of 1 / √n to bfloat16
        torch.testing.assert_close(matrix @ matrix.t(), eye, rtol=0, atol=2**-7)
        rotated = (weight * packed.transform_scale.double()) @ torch.linalg.inv(matrix).t()
        scale = rotated.square().mean(dim=1).sqrt()
        torch.testing.assert_close(packed.weight_scale.double(), scale, rtol=2**-8, atol=0)
        torch.testing.assert_close(rotated.norm(dim=1), weight.norm(dim=1), rtol=2**-7, atol=0)
        difference = packed.dequantized_weight(torch.float32).double() - rounded(rotated, packed.weight_scale.double())
        assert float((difference.abs() < 1e-5 * rotated.abs().amax()).double().mean()) > 0.999
        assert float((packed.effective_weight(torch.float64) - weight).norm() / weight.norm()) < 0.12


def test_wide_inputs_are_rotated_in_blocks_and_others_as_a_whole(tmp_path):
    pipe = tiny_pipeline("cogvideox", num_layers=1)
    run(tmp_path / "out", recipe="rtn-w8a8", overrides=["transforms.rotation=hadamard", "transforms.block_size=30"])
    loaded = load_pipeline(tmp_path / "out")
    packed = loaded.transformer.transformer_blocks[0].get_submodule("ff.net.2")
    assert (packed.transform_left, packed.path.right) == (None, packed.transform_right.shape[0])
    assert packed.in_features % packed.path.right == 0
    assert 8 <= packed.path.right <= 30
    assert loaded.transformer.transformer_blocks[0].attn1.to_q.transform_left is not None
    exact, found = run_pipeline(pipe), run_pipeline(loaded)
    assert float((found - exact).norm() / exact.norm()) < 0.05


def test_blocks_without_a_rotation_are_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="block_size=8 needs a rotation; set transforms.rotation=kronecker"):
        run(tmp_path / "out", recipe="rtn-w8a8", overrides=["transforms.block_size=8"])


def test_q_k_and_v_share_a_rotation_and_others_have_their_own(orbit):
    block = orbit.pipe.transformer.transformer_blocks[0]
    signs = [block.get_submodule(name).transform_scale for name in (*SIBLINGS, "attn1.to_out.0")]
    assert torch.equal(signs[0], signs[1])
    assert torch.equal(signs[0], signs[2])
    assert not torch.equal(signs[0], signs[3])


def test_modulation_is_rounded_to_nearest_and_nothing_was_sampled(orbit, tmp_path):
    run(tmp_path / "rtn", recipe="rtn-w4a4")
    plain = load_file(tmp_path / "rtn" / WEIGHTS)
    names = [name for name in plain if ".norm1.linear." in name]
    assert names
    assert all(torch.equal(orbit.weights[name], plain[name]) for name in names)
    assert orbit.report.selection is None
    assert [stage["name"] for stage in orbit.report.stages] == ["load", "blocks", "assemble"]
    assert not orbit.report.blocks[0].loss


def test_the_checkpoint_loads_and_generates_and_says_that_it_is_simulated(orbit):
    inspected = inspect_checkpoint(orbit.out, verify=True)
    assert inspected.verified
    assert inspected.simulated
    assert orbit.report.simulated
    assert inspected.storage["quantized_bytes"] == orbit.report.storage["quantized_bytes"]
    schemes = json.loads((orbit.out / "transformer/config.json").read_text())["quantization_config"]["schemes"]
    assert {side["levels"] for side in schemes["w4ca4c"].values()} == {"lloyd_max"}
    assert "levels" not in schemes["w4a16"]["weight"]
    assert torch.isfinite(run_pipeline(orbit.pipe)).all()


def test_two_runs_are_bit_identical_and_other_seeds_rotate_otherwise(orbit, tmp_path):
    run(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (orbit.out / WEIGHTS).read_bytes()
    run(tmp_path / "other", seed=1)
    assert (tmp_path / "other" / WEIGHTS).read_bytes() != (orbit.out / WEIGHTS).read_bytes()


@pytest.mark.parametrize("parts", [["rotation=hadamard"], ["rotation=kronecker", "start=random"]])
def test_a_rotation_gives_the_same_codes_without_samples_as_with_them(tmp_path, parts):
    parts = [*(f"transforms.{part}" for part in parts), "clip.constant=0.9"]
    run(tmp_path / "without", recipe="rtn-w4a4", overrides=parts)
    run(
        tmp_path / "with",
        recipe="rtn-w4a4",
        overrides=[*parts, *SAMPLES, "modulation.rounding=gptq"],
        prompts=["a"],
    )
    without, sampled = (load_file(tmp_path / name / WEIGHTS) for name in ("without", "with"))
    assert without.keys() == sampled.keys()
    different = [name for name in without if not torch.equal(without[name], sampled[name])]
    assert different
    assert all(".norm" in name for name in different)


def test_another_family_without_modulation_linears(tmp_path):
    run(tmp_path / "out", pipe=tiny_pipeline("wan"))
    assert inspect_checkpoint(tmp_path / "out", verify=True).simulated


@pytest.mark.parametrize("width", WIDTHS)
def test_what_the_recipes_consist_of(width):
    recipe = load_recipe(f"orbitquant-{width}")
    assert not recipe.calibrates
    assert recipe.description.startswith("experimental: ")
    assert (recipe.weights.levels, recipe.activations.levels, recipe.modulation.levels) == (
        "lloyd_max",
        "lloyd_max",
        "uniform",
    )
    assert (recipe.transforms.rotation, recipe.transforms.scale, recipe.transforms.shift) == (
        "hadamard",
        "none",
        "none",
    )
    assert recipe.modulation.num_bits == (8 if width == "w8a8" else 4)
    planned = plan("shapes-cogvideox", recipe=recipe)
    assert planned.simulated
    assert planned.calibration is None


def test_parts_that_learn_work_on_codebooks_too(tmp_path):
    report = run(
        tmp_path / "out",
        overrides=[
            *SAMPLES,
            "transforms.rotation=kronecker",
            "clip.weights=true",
            "clip.activations=true",
            "distillation.epochs=2",
            "rounding.method=gptq",
        ],
        prompts=["a"],
    )
    loss = report.blocks[0].loss
    assert loss["distilled"] <= loss["initial"]
    assert all(one["error"] <= one["rtn_error"] for one in report.blocks[0].rounding.values())
    assert torch.isfinite(run_pipeline(load_pipeline(tmp_path / "out"))).all()


def test_levels_that_a_checkpoint_does_not_know_are_refused(orbit, tmp_path):
    import shutil

    shutil.copytree(orbit.out, tmp_path / "broken")
    path = tmp_path / "broken/transformer/config.json"
    path.write_text(path.read_text().replace("lloyd_max", "loyd_max"))
    with pytest.raises(InvalidInputError, match="levels 'loyd_max'"):
        inspect_checkpoint(tmp_path / "broken")
