"""Group sizes and bits that linears are given one by one."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from s2q.calibration.stream import TeacherStream
from s2q.calibration.teacher import TeacherTransformer
from s2q.checkpoint import inspect_checkpoint, load_pipeline
from s2q.common.errors import InvalidInputError
from s2q.common.run_folder import open_run_folder
from s2q.models import block_linears, family_of
from s2q.planning import plan
from s2q.planning.resolve import resolve
from s2q.recipes.load import load_recipe
from s2q.run import allocate as allocate_module
from s2q.run.allocate import block_errors, chosen_schemes
from s2q.run.quantize import quantize
from tiny import run_pipeline, tiny_pipeline, tiny_transformer, transformer_inputs

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
SMALL = ["calibration.n_prompts=1", "calibration.steps=2", "calibration.samples=2"]
WEIGHTS_OF_BLOCK = 4 * 64 * 64 + 2 * 64 * 256
PROJ, OUT = "ff.net.0.proj", "attn1.to_out.0"


def bits(budget, *, recipe="vidit-q-mp-w4a4"):
    allocation = f"allocation={{what: weight_bits, candidates: [4, 8], budget: {budget}}}"
    return load_recipe(recipe, overrides=[*SMALL, allocation])


def groups(budget, *, recipe="q-dit-w4a4"):
    sizes = ["weights.group_size=64", "activations.group_size=64", "allocation.candidates=[32, 64]"]
    return load_recipe(recipe, overrides=[*SMALL, *sizes, f"allocation.budget={budget}"])


def run(out, recipe, *, pipe=None, **arguments):
    pipe = tiny_pipeline("cogvideox") if pipe is None else pipe
    report = quantize(pipe, recipe=recipe, out=out, prompts=["a"], **arguments)
    return report, json.loads((out / "s2q/allocation.json").read_text())


def given(record):
    return {name: unit["given"] for unit in record["units"] for name in unit["linears"]}


def budget_for(extra, *, least, layers=2):
    """Bits a weight that leave `extra` bytes beyond the smallest candidates of tiny CogVideoX."""
    return (8 * extra / layers + least) / WEIGHTS_OF_BLOCK


GROUPS_OF_64 = WEIGHTS_OF_BLOCK * (4 + 16 / 64)
FOUR_BITS = WEIGHTS_OF_BLOCK * 4 + 16 * (4 * 64 + 256 + 64)
"""Bits of a block: codes, and one scale in bf16 for each output channel."""


@pytest.mark.parametrize("factor", [50, 1 / 50])
def test_the_linear_that_needs_small_groups_gets_them(tmp_path, factor):
    """Half of the channels of an input are far larger or smaller than the others, their weights the other way round."""
    pipe = tiny_pipeline("cogvideox")
    block = pipe.transformer.transformer_blocks[1]
    with torch.no_grad():
        block.norm2.norm.weight[:32] *= factor
        block.get_submodule(PROJ).weight[:, :32] /= factor
    recipe = groups(budget_for(256 * 2, least=GROUPS_OF_64))
    report, record = run(tmp_path / "out", recipe, pipe=pipe)
    name = f"transformer_blocks.1.{PROJ}"
    assert {linear for linear, size in given(record).items() if size == 32} == {name}
    (unit,) = (one for one in record["units"] if one["linears"] == [name])
    coarse, fine = unit["candidates"]
    assert (coarse["value"], fine["value"], fine["bytes"] - coarse["bytes"]) == (64, 32, 256 * 2)
    assert fine["error"] < coarse["error"] / 4
    schemes = {layer["name"]: layer["scheme"] for layer in report.layers}
    assert schemes.pop(name) == "w4g32a4g32"
    assert set(schemes.values()) == {"w4g64a4g64", "w4a16", "w8a16"}
    assert report.simulated


def test_where_small_groups_bring_nothing_none_are_taken():
    recipe = groups(4.5)
    linears = resolve(recipe, all_linears())
    units = [(linear,) for linear in linears if linear.role == "linear"]
    equal = chosen_schemes(recipe, linears, {unit: [1.0, 1.0] for unit in units})
    assert set(given(equal.record).values()) == {64}
    better = chosen_schemes(recipe, linears, {unit: [1.0, 0.5] for unit in units})
    assert {linear.scheme.name for linear in better.linears} == {"w4g32a4g32", "w4a16"}
    assert set(given(better.record).values()) == {32}
    assert better.record["bytes"] == better.record["most_bytes"]  # 4.5 bits a weight are groups of 32


def all_linears():
    with torch.device("meta"):
        transformer = tiny_transformer()
    return block_linears(transformer, family_of(transformer))


def test_the_sensitive_linear_gets_8_bits_and_the_checkpoint_has_them(tmp_path):
    """One weight of each of its rows is so large that 4 bits leave nothing of the others; its input is zero."""
    pipe = tiny_pipeline("cogvideox")
    block = pipe.transformer.transformer_blocks[0]
    with torch.no_grad():
        block.get_submodule(OUT).weight[:, 0] = 20
        block.attn1.to_v.weight[0], block.attn1.to_v.bias[0] = 0, 0
    recipe = bits(budget_for(64 * 64 // 2, least=FOUR_BITS), recipe="rtn-w4a4")
    report, record = run(tmp_path / "out", recipe, pipe=pipe)
    name = f"transformer_blocks.0.{OUT}"
    assert {linear for linear, size in given(record).items() if size == 8} == {name}
    assert record["bytes"] == record["most_bytes"] == report.allocation["bytes"]
    loaded = load_pipeline(tmp_path / "out")
    assert loaded.transformer.get_submodule(name).scheme.name == "w8a4"
    assert loaded.transformer.get_submodule(name.replace("0.attn1", "1.attn1")).scheme.name == "w4a4"
    assert torch.isfinite(run_pipeline(loaded)).all()


@pytest.mark.parametrize(("recipe", "budget"), [("q-dit-w4a4", 4.4), ("vidit-q-mp-w4a6", 6)])
def test_what_is_stored_keeps_the_budget_and_the_plan(tmp_path, recipe, budget):
    tiny_pipeline("cogvideox", dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    recipe = load_recipe(recipe, overrides=[*SMALL, f"allocation.budget={budget}"])
    planned = plan(tmp_path / "model", recipe=recipe)
    assert [stage.name for stage in planned.stages] == ["collect", "select", "allocate", "blocks", "assemble"]
    assert planned.allocation.bytes is None
    assert planned.allocation.most_bytes == 2 * WEIGHTS_OF_BLOCK * budget // 8
    report = quantize(tmp_path / "model", recipe=recipe, out=tmp_path / "out", prompts=["a"])
    assert [stage["name"] for stage in report.stages][2:4] == ["select", "allocate"]
    stored = load_file(tmp_path / "out" / WEIGHTS)
    own = {layer.name for layer in planned.layers if layer.scheme.startswith("≤ ")}
    assert len(own) == 12
    taken = sum(stored[f"{name}.{part}"].nbytes for name in own for part in ("weight", "weight_scale"))
    assert taken == report.allocation["bytes"] <= report.allocation["most_bytes"]
    total = sum(tensor.nbytes for tensor in stored.values())
    assert total == report.storage["quantized_bytes"]
    assert total == planned.storage["quantized_bytes"] - (planned.allocation.most_bytes - taken)
    inspected = inspect_checkpoint(tmp_path / "out", verify=True)
    assert inspected.verified
    assert {one.name: (one.scheme, one.bytes) for one in inspected.layers} == {
        layer["name"]: (layer["scheme"], layer["bytes"]) for layer in report.layers
    }
    for before, after in zip(planned.layers, report.layers, strict=True):
        assert after["bytes"] <= before.bytes
        assert (after["scheme"] == before.scheme) == (before.name not in own)


@pytest.mark.parametrize("recipe", [groups(4.4), bits(6)], ids=["group_size", "weight_bits"])
def test_a_killed_run_goes_on_with_the_same_allocation(tmp_path, monkeypatch, recipe):
    _, whole = run(tmp_path / "whole", recipe)
    original, measured = allocate_module.candidate_losses, []

    def counted(opened, group, unit, schemes):
        measured.append(unit[0].name)
        if kill and measured[-1].startswith("transformer_blocks.1."):
            raise KeyboardInterrupt
        return original(opened, group, unit, schemes)

    monkeypatch.setattr(allocate_module, "candidate_losses", counted)
    kill = True
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", recipe)
    kill, measured = False, []
    _, record = run(tmp_path / "out", recipe)
    assert {name.split(".")[1] for name in measured} == {"1"}
    assert record == whole
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("name", [PROJ, "attn1.to_k"])
def test_an_error_is_that_of_the_block_with_that_linear_rounded(tmp_path, name):
    """A weight of 4 bits in block 1, everything else as it is, coded again here."""
    transformer = tiny_transformer().requires_grad_(False)
    recipe = load_recipe("rtn-w4a4", overrides=["allocation={what: weight_bits, candidates: [4, 8], budget: 6}"])
    linears = resolve(recipe, block_linears(transformer, family_of(transformer)))
    one = TeacherTransformer(component="transformer", module=transformer, linears=tuple(linears))
    calls = [lambda seed=seed: transformer_inputs(seed=seed) for seed in (1, 2)]
    stream = TeacherStream(
        transformer,
        one.block_names,
        calls=calls,
        names=["a", "b"],
        steps=[0, 1],
        family=one.family,
        folder=tmp_path,
    )
    selected = SimpleNamespace(inputs=SimpleNamespace(seed=0), fingerprint=lambda component: "these")
    with open_run_folder(tmp_path / "out") as folder:
        errors = block_errors(one, recipe, 1, stream=stream, folder=folder, selected=selected)
    block = transformer.transformer_blocks[1]
    rounded = copy.deepcopy(block)
    weight = block.get_submodule(name).weight
    step = (weight.abs().amax(dim=1, keepdim=True) / 7).bfloat16().float()
    rounded.get_submodule(name).weight.copy_((weight / step).round() * step)
    seen = []
    block.register_forward_hook(lambda _block, args, kwargs, out: seen.append((args, kwargs, out)), with_kwargs=True)
    for call in calls:
        transformer(**call(), return_dict=False)
    noise = power = 0.0
    for args, kwargs, outputs in seen:
        for new, old in zip(rounded(*args, **kwargs), outputs, strict=True):
            noise += float((new - old).double().square().sum())
            power += float(old.double().square().sum())
    four, eight = next(losses for (linear,), losses in errors.items() if linear.inner_name == name)
    assert four == pytest.approx(noise / power, rel=1e-3)
    assert eight < four / 50


def test_samples_are_as_many_as_asked_for_and_those_of_the_run(tmp_path, monkeypatch):
    counts = []
    original = allocate_module.candidate_losses

    def counted(opened, *arguments):
        counts.append(len(opened.samples))
        return original(opened, *arguments)

    monkeypatch.setattr(allocate_module, "candidate_losses", counted)
    pipe = tiny_pipeline("cogvideox", num_layers=1)
    recipe = load_recipe(bits(6).resolved(), overrides=["allocation.samples=1"])
    run(tmp_path / "one", recipe, pipe=pipe)
    run(tmp_path / "all", bits(6), pipe=pipe)
    assert counts == [1] * 6 + [2] * 6


def test_skipped_linears_take_no_part(tmp_path):
    recipe = load_recipe(bits(6).resolved(), overrides=["skip=['transformer_blocks.0.*', '*.to_k']"])
    _, record = run(tmp_path / "out", recipe)
    assert set(given(record)) == {
        f"transformer_blocks.1.{name}" for name in ("attn1.to_q", "attn1.to_v", OUT, PROJ, "ff.net.2")
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["allocation.candidates=[96, 128, 192]"],
            r"transformer_blocks\.0\.attn1\.to_q: in_features=64 is divisible by none of allocation\.candidates="
            r"\[96, 128, 192\]; add 64",
        ),
        (
            ["allocation.budget=4.2"],
            r"budget=4.2 bits per weight, but the smallest candidates of its 12 linears take 4\.\d+ .*to at least that",
        ),
        (["allocation.candidates=[128]"], "expected at least two different whole numbers above 0"),
        (["allocation.candidates=[0, 128]"], "expected at least two different whole numbers above 0"),
        (["allocation.what=bits"], "expected one of group_size, weight_bits"),
        (["allocation.budget=0"], "allocation.budget"),
        (["allocation.candidates=[32, 64]"], r"weights\.group_size=128 is none of allocation\.candidates=\[32, 64\]"),
        (["activations.group_size=256"], r"activations\.group_size=256 is none of"),
        (["allocation.what=weight_bits"], r"candidates=.*expected bits, each 2 to 8"),
        (["allocation.budgets=5"], r"nearest keys are allocation\.budget"),
    ],
)
def test_what_cannot_be_allocated_is_refused_before_compute(tmp_path, overrides, message):
    with pytest.raises(InvalidInputError, match=message):
        quantize(
            tiny_pipeline("cogvideox"), recipe="q-dit-w4a4", out=tmp_path / "out", prompts=["a"], overrides=overrides
        )
    assert not list(tmp_path.iterdir())


def test_the_remedy_for_a_small_budget_is_enough():
    linears = [one for one in all_linears() if one.role == "linear"]
    for recipe in ("q-dit-w4a4", "vidit-q-mp-w4a4"):
        with pytest.raises(InvalidInputError) as caught:
            resolve(load_recipe(recipe, overrides=["allocation.budget=4.1"]), linears)
        needed = str(caught.value).split(" take ")[1].split()[0]
        resolve(load_recipe(recipe, overrides=[f"allocation.budget={needed}"]), linears)


def test_allocation_needs_prompts_and_widths_that_it_replaces(tmp_path):
    allocation = "allocation={what: weight_bits, candidates: [4, 8], budget: 6}"
    with pytest.raises(InvalidInputError, match="recipe rtn-w4a4 needs calibration prompts"):
        quantize(tiny_pipeline("cogvideox"), recipe="rtn-w4a4", out=tmp_path / "out", overrides=[allocation])
    assert not list(tmp_path.iterdir())
    with pytest.raises(InvalidInputError, match=r"weights\.num_bits=3 is none of .*replace it"):
        load_recipe("rtn-w4a4", overrides=[allocation, "weights.num_bits=3"])
    sizes = "allocation={what: group_size, candidates: [32, 64], budget: 6}"
    with pytest.raises(InvalidInputError, match=r"weights\.group_size=None .* with granularity=per_group"):
        load_recipe("rtn-w4a4", overrides=[sizes])
