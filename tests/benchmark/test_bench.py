"""Every case at a size where times say nothing; what is asserted is what was measured, not how long it took."""

import json
from dataclasses import replace

import pytest
import torch

from s2q.benchmark import bench, machine, micro
from s2q.benchmark.calibration_block import (
    calibration_case,
    first_block,
    first_optimization,
    first_student,
    synthetic_subject,
)
from s2q.benchmark.case import Case, Settings
from s2q.benchmark.pipeline_steps import pack_randomly, pipeline_step_case
from s2q.benchmark.results import IDENTITY, ResultsFile, identity
from s2q.benchmark.steps import synthetic_step_case
from s2q.benchmark.synthetic_blocks import synthetic_block
from s2q.benchmark.timing import TimingOptions
from s2q.common.errors import InvalidInputError, ResourceError
from s2q.models import block_linears, family_of, resolve_model
from s2q.models.synthetic import synthetic_model
from s2q.nn import PackedLinear, StudentLinear, StudentRows
from s2q.recipes.load import load_recipe, recipe_names
from tiny import run_transformer, tiny_pipeline, tiny_transformer

QUICK = TimingOptions(repeats=2, seconds=1.0, sample_milliseconds=0.0)
TIMES = {"milliseconds", "milliseconds_quartiles", "bf16_milliseconds", "ratio_to_bf16", "bound_ratio", "rounds"}
BASELINE = {"baseline", "ratio_to_baseline"}
MEMORY = {"peak_memory_bytes", "bf16_peak_memory_bytes"}
STORAGE = {"storage_bytes", "bf16_storage_bytes"}
PARTS = {"gemm", "activation_path", "attention", "norms", "other"}


def settings(*recipes, **changes):
    names = recipes or ("s2q-w4a6",)
    base = {"device": "cpu", "backends": ("auto", "reference"), "options": QUICK, "tokens": 8}
    base |= {"blocks": 1, "attention": None, "generation": {}}
    return Settings(**base | changes, recipes=tuple(load_recipe(name) for name in names))


def measured(case):
    entries = case.measure(case.wanted)
    assert [{name: one[name] for name in IDENTITY} for one in entries] == list(case.wanted)
    json.dumps(entries, allow_nan=False)
    for one in entries:
        assert one.keys() >= TIMES | MEMORY | BASELINE
        assert one["milliseconds"] > 0
        assert one["ratio_to_bf16"] > 0
        full = [name for name in ("bf16", "fp32") if f"{name}_milliseconds" in one]
        assert one["op"] in ("attention_colsum", "calibration_block") or full == ["bf16", "fp32"]
        assert one["baseline"] == min(full, key=lambda name: one[f"{name}_milliseconds"])
        assert one["ratio_to_baseline"] == one[f"ratio_to_{one['baseline']}"]
    return entries


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline("cogvideox", dtype=torch.bfloat16).save_pretrained(path)
    return path


def small_model(name="cogvideox-2b"):
    model = synthetic_model(name)
    small = {"num_attention_heads": 2, "attention_head_dim": 48, "num_layers": 3}
    lists = tuple(replace(one, count=3) for one in model.block_lists)
    return replace(model, config=dict(model.config) | small, block_lists=lists, text_tokens=6)


def test_single_operations_are_measured_for_each_recipe(folder):
    recipes = ("s2q-w4a6", "rtn-w4a16")
    cases = bench.make_cases(str(folder), list(micro.OP_BACKENDS), settings(*recipes))
    found = {}
    for case in cases:
        for one in measured(case):
            found.setdefault(one["op"], []).append(one)
            assert one.keys() >= STORAGE
            assert one["layers"]
    assert {op: len(entries) for op, entries in found.items()} == {
        "linear": (3 + 1) * 2 * 2,  # shapes and one group of q, k, v; recipes, backends
        "activation_path": 3 * 2,
        "gemm": 3 * 2,
        "attention_colsum": 2,
    }
    assert {tuple(one["shape"]) for one in found["linear"]} == {(8, 64, 64), (8, 64, 256), (8, 256, 64)}
    assert {one["scheme"] for one in found["linear"]} == {"w4a6", "w4a16"}
    assert {one["backend"]: one["ran"] for one in found["linear"]} == {"auto": "cpu", "reference": "reference"}
    assert {one["backend"]: one["ran"] for one in found["gemm"]} == {"auto": "cpu", "reference": "reference"}
    assert {one["ran"] for one in found["attention_colsum"]} == {"reference"}
    assert found["attention_colsum"][0]["shape"] == [8, 64, 8]
    assert found["activation_path"][0]["bound_ratio"] is None
    has_bound = machine.has_int8_gemm("cpu")
    assert all((one["bound_ratio"] is not None) == has_bound for one in found["linear"] + found["gemm"])
    (group,) = {tuple(one["shape"]) for one in found["linear"] if one["readers"] == 3}
    assert group == (8, 64, 64)
    alone, together = (
        next(one for one in found["linear"] if one["shape"] == [8, 64, 64] and one["readers"] == readers)
        for readers in (None, 3)
    )
    for name in STORAGE:
        assert together[name] == 3 * alone[name]
    bare = next(one for one in found["linear"] if one["recipe"] == "rtn-w4a16" and one["shape"] == [8, 64, 256])
    assert bare["storage_bytes"] == 256 * 32 + 256 * 4 + 256 * 2
    assert bare["bf16_storage_bytes"] == 256 * 64 * 2 + 256 * 2


def test_only_what_is_missing_is_measured(folder):
    (case, *_) = bench.make_cases(str(folder), ("linear",), settings("s2q-w4a6", "rtn-w4a16"))
    entries = case.measure(case.wanted[2:3])
    assert [(one["recipe"], one["backend"]) for one in entries] == [("rtn-w4a16", "auto")]


@pytest.mark.parametrize("blocks", [1, 2, 9])
def test_a_step_is_the_sum_over_blocks(blocks):
    model = small_model()
    case = synthetic_step_case(model, settings("s2q-w4a6", "s2q-w4a4", blocks=blocks))
    entries = measured(case)
    assert [one["recipe"] for one in entries] == ["s2q-w4a6", "s2q-w4a4"]
    for one in entries:
        assert (one["model"], one["tokens"], one["blocks"]) == ("synthetic:cogvideox-2b", 8, blocks)
        assert set(one["breakdown"]) == set(one["bf16_breakdown"]) == PARTS
        assert sum(one["breakdown"].values()) == pytest.approx(one["milliseconds"])
        assert sum(one["bf16_breakdown"].values()) == pytest.approx(one["bf16_milliseconds"])
        assert one["breakdown"]["activation_path"] > 0
        assert one["bf16_breakdown"]["activation_path"] == 0
        parameters = sum(parameter.numel() for parameter in model.meta_transformer().parameters())
        assert one["bf16_storage_bytes"] == 2 * parameters
        assert one["storage_bytes"] < one["bf16_storage_bytes"]


def test_a_step_of_two_lists_of_blocks():
    model = synthetic_model("hunyuanvideo")
    small = {"num_attention_heads": 2, "attention_head_dim": 128, "num_layers": 2, "num_single_layers": 2}
    lists = tuple(replace(one, count=2) for one in model.block_lists)
    model = replace(model, config=dict(model.config) | small, block_lists=lists, text_tokens=6)
    (one,) = measured(synthetic_step_case(model, settings()))
    assert sum(one["breakdown"].values()) == pytest.approx(one["milliseconds"])


@pytest.mark.slow
def test_fp32_bf16_and_quantized_side_by_side(folder):
    case = pipeline_step_case(resolve_model(folder), settings("s2q-w4a6", "rtn-w4a16"))
    entries = measured(case)
    assert [(one["scheme"], one["backend"]) for one in entries] == [
        ("fp32", "torch"),
        ("w4a6", "auto"),
        ("w4a16", "auto"),
    ]
    fp32, packed = entries[:2]
    assert fp32["storage_bytes"] == 2 * fp32["bf16_storage_bytes"]
    assert packed["storage_bytes"] < packed["bf16_storage_bytes"]
    for one in entries:
        assert set(one["breakdown"]) == PARTS
        assert one["video_tokens"] == one["tokens"] == 3


@pytest.mark.slow
def test_a_checkpoint_brings_its_own_linears(folder, tmp_path):
    import s2q

    s2q.quantize(folder, recipe="rtn-w4a8", out=tmp_path / "q")
    case = pipeline_step_case(resolve_model(tmp_path / "q"), settings())
    assert [(one["scheme"], one["recipe"]) for one in case.wanted] == [("fp32", None), ("w4a8", "rtn-w4a8")]
    fp32, packed = measured(case)
    assert fp32["storage_bytes"] == 2 * fp32["bf16_storage_bytes"] > packed["storage_bytes"]


FIXED = [name for name in recipe_names() if name.endswith("-w4a6") and load_recipe(name).allocation is None]


@pytest.mark.parametrize("recipe", FIXED)
def test_random_packing_has_the_layers_of_the_recipe_and_finite_outputs(recipe):
    packed = pack_randomly(tiny_transformer(), load_recipe(recipe), frames=3)
    linears = block_linears(packed, family_of(packed))
    assert all(isinstance(packed.get_submodule(one.name), PackedLinear) for one in linears)
    assert bool(run_transformer(packed).isfinite().all())


def test_random_packing_has_the_outer_linears_that_a_recipe_quantizes():
    recipe = load_recipe("rtn-w4a6", overrides=["outer.num_bits=8"])
    packed = pack_randomly(tiny_transformer(), recipe, frames=3)
    assert isinstance(packed.patch_embed.text_proj, PackedLinear)
    assert bool(run_transformer(packed).isfinite().all())


def test_a_calibrated_block_takes_epochs_times_samples_steps(folder):
    recipes = ("s2q-w4a6", "q-vdit-w4a6", "rtn-w4a6")
    for subject in (resolve_model(folder), resolve_model("shapes-wan"), small_model(), small_model("cogvideox-5b")):
        case = calibration_case(subject, settings(*recipes, generation={"num_frames": 9, "height": 32, "width": 32}))
        entries = measured(case)
        assert [one["recipe"] for one in entries] == ["s2q-w4a6", "q-vdit-w4a6"], "rounding alone has no steps"
        for one in entries:
            assert one["steps_per_block"] == 40 * 15
            assert one["seconds_per_block"] == pytest.approx(600 * one["milliseconds"] / 1000)
            assert one["blocks_of_model"] in (2, 3, 6)


def test_a_recipe_may_skip_linears_of_other_blocks_than_the_calibrated_one(folder):
    recipe = load_recipe("s2q-w4a6", overrides=["skip=['transformer_blocks.1.*']"])
    size = {"num_frames": 9, "height": 32, "width": 32}
    case = calibration_case(resolve_model(folder), replace(settings(generation=size), recipes=(recipe,)))
    assert len(measured(case)) == 1


@pytest.mark.parametrize(
    ("recipe", "parts"),
    [
        ("s2q-w4a6", {"transform", "clip", "weight_clip"}),
        ("s2q-plus-w4a6", {"transform", "clip", "weight_clip", "shift", "low_rank_basis"}),
        ("q-vdit-w4a6", {"weight_clip", "estimator"}),
        ("brecq-w4a6", {"clip", "rounding"}),
    ],
)
def test_the_student_has_every_part_of_the_recipe_and_a_step_learns(recipe, parts):
    model, recipe, generator = small_model(), load_recipe(recipe), torch.Generator().manual_seed(0)
    block = synthetic_block(model, model.block_lists[0], generator=generator, dtype=torch.float32)
    subject = synthetic_subject(model, model.block_lists[0], block, tokens=24, generator=generator)
    with first_block(subject, recipe, device="cpu") as opened:
        student = first_student(opened)
        optimization = first_optimization(student, recipe)
        before = [parameter.clone() for parameter in optimization.learnable]
        for index in range(2):
            assert float(optimization.step(opened.samples[index])) > 0
        moved = [bool((one != other).any()) for one, other in zip(before, optimization.learnable, strict=True)]
    linears = [linear.inner_name for linear in subject.linears if linear.role == "linear"]
    students = {name: student.get_submodule(name) for name in linears}
    assert all(isinstance(layer, StudentLinear | StudentRows) for layer in students.values())
    for layer in students.values():
        layer = getattr(layer, "joint", layer)  # q, k and v have one
        names = ("transform", "clip", "shift", "low_rank_basis")
        present = {name for name in names if getattr(layer.source, name) is not None}
        present |= {name for name in ("weight_clip", "estimator", "rounding") if getattr(layer, name) is not None}
        assert present == parts
    assert sum(moved) > 0.9 * len(moved)


def test_running_resumes_and_goes_on_after_a_case_without_memory(tmp_path):
    ran = []

    def case(name, error=None):
        def measure(missing):
            ran.append((name, len(missing)))
            if error is not None:
                raise error
            return [one | {"milliseconds": 1.0} for one in missing]

        wanted = tuple(identity(op="linear", shape=[1, 1, n], recipe=name) for n in range(2))
        return Case(label=name, wanted=wanted, measure=measure)

    results = ResultsFile(tmp_path / "b.json", hardware={}, versions={})
    first = case("first")
    results.add([first.wanted[0] | {"milliseconds": 2.0}])
    cases = [first, case("large", torch.OutOfMemoryError("no room")), case("last")]
    seen = []
    with pytest.raises(ResourceError, match="large: out of memory"):
        bench.run_cases(bench.missing_cases(cases, results), results, progress=lambda *one: seen.append(one))
    assert ran == [("first", 1), ("large", 2), ("last", 2)]
    assert seen == [("bench", done, 3) for done in range(4)]
    assert len(results.content["results"]) == 4
    assert [one.label for one in bench.missing_cases(cases, results)] == ["large"]
    with pytest.raises(RuntimeError, match="a defect"):
        bench.run_cases([case("broken", RuntimeError("a defect"))], results)


def test_backends_that_cannot_run_are_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert bench._check_backends(["reference", "auto"], "cpu") == ("auto", "reference")
    with pytest.raises(ResourceError, match="'triton' cannot run here"):
        bench._check_backends(["triton"], "cpu")
    with pytest.raises(ResourceError, match=r"'fp4' cannot run here: .*compute capability 10.0 or newer; remove it"):
        bench._check_backends(["fp4"], "cpu")
    with pytest.raises(InvalidInputError, match="nearest names are triton"):
        bench._check_backends(["tritom"], "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "say nothing" in machine.measuring_obstacle("triton", "cpu")


def test_recipes_of_one_name_are_refused(folder):
    with pytest.raises(InvalidInputError, match="twice"):
        bench.make_cases(str(folder), ("linear",), settings("s2q-w4a6", "s2q-w4a6"))


def test_peak_memory_is_that_of_the_call():
    peak = machine.peak_memory(lambda: torch.ones(64 << 20, dtype=torch.uint8), "cpu")
    assert peak is None or 48 << 20 < peak < 256 << 20
