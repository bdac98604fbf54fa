"""Sensitivity of each kind of linears, on a tiny pipeline that was rounded to four bits."""

import copy

import pytest
import torch

from s2q.common.components import pattern_of
from s2q.common.errors import InvalidInputError
from s2q.evaluation.evaluate import evaluate
from s2q.evaluation.sensitivity import kind_errors, linears_by_kind
from s2q.evaluation.summary import summarise_kinds
from s2q.evaluation.velocity import velocity_errors
from s2q.generation.load import load_pipeline
from s2q.generation.settings import resolve_settings
from s2q.generation.trajectory import record_trajectory
from s2q.nn.packed import PackedLinear
from s2q.nn.swap import replace_module
from s2q.run.quantize import quantize
from tiny import tiny_pipeline

QUERY = "transformer_blocks.*.attn1.to_q"


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("cogvideox")


@pytest.fixture(scope="module")
def folders(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sensitivity")
    pipe.save_pretrained(folder / "full")
    quantize(folder / "full", recipe="rtn-w4a4", out=folder / "quantized")
    return folder / "full", folder / "quantized"


@pytest.fixture(scope="module")
def student(folders):
    return load_pipeline(folders[1], dtype="float32").transformer


@pytest.fixture(scope="module")
def trajectory(pipe):
    settings = resolve_settings(pipe, requested={"num_inference_steps": 2, "guidance_scale": 4.0})
    return record_trajectory(pipe, ["red", "blue"], seeds=[0, 1], settings=settings)


@pytest.fixture(scope="module")
def errors(pipe, student, trajectory):
    return kind_errors({"transformer": pipe.transformer}, linears_by_kind({"transformer": student}), trajectory)


def test_a_kind_is_a_linear_in_all_blocks(pipe, student):
    kinds = linears_by_kind({"transformer": student})
    blocks = len(student.transformer_blocks)
    assert list(kinds[QUERY]) == [f"transformer_blocks.{index}.attn1.to_q" for index in range(blocks)]
    packed = [name for name, module in student.named_modules() if isinstance(module, PackedLinear)]
    assert sorted(name for names in kinds.values() for name in names) == sorted(packed)


def test_the_error_of_a_kind_is_that_of_the_teacher_with_its_linears_packed(pipe, student, trajectory, errors):
    teacher = copy.deepcopy(pipe.transformer)
    for name in linears_by_kind({"transformer": student})[QUERY]:
        replace_module(teacher, name, student.get_submodule(name))
    expected = velocity_errors({"transformer": teacher}, trajectory)
    for video, steps in zip(errors, expected, strict=True):
        assert video[QUERY] == pytest.approx(sum(steps) / len(steps), rel=1e-5)


def test_every_kind_has_an_error_below_that_of_the_model(student, trajectory, errors):
    whole = velocity_errors({"transformer": student}, trajectory)
    for video, steps in zip(errors, whole, strict=True):
        assert list(video) == list(linears_by_kind({"transformer": student}))
        assert all(value > 0 for value in video.values())
        assert min(video.values()) < sum(steps) / len(steps) < 3 * sum(video.values())


def test_both_models_are_as_before_also_after_an_error(pipe, student, trajectory):
    before = dict(pipe.transformer.named_modules()), dict(student.named_modules())
    hooks = len(pipe.transformer._forward_pre_hooks)
    kinds = {"broken": {QUERY.replace("*", "0"): torch.nn.Linear(3, 5)}} | dict(
        linears_by_kind({"transformer": student})
    )
    kinds["broken"][QUERY.replace("*", "0")].needs_grid = True
    with pytest.raises(RuntimeError, match="shape"):
        kind_errors({"transformer": pipe.transformer}, kinds, trajectory)
    assert (dict(pipe.transformer.named_modules()), dict(student.named_modules())) == before
    assert len(pipe.transformer._forward_pre_hooks) == hooks


def test_linears_of_a_second_transformer_are_kinds_of_their_own(student):
    kinds = linears_by_kind({"transformer": student, "transformer_2": student})
    assert {f"transformer_2.{kind}" for kind in linears_by_kind({"transformer": student})} < set(kinds)


def test_linears_that_need_the_positions_of_tokens_get_them(tmp_path, pipe, trajectory):
    pipe.save_pretrained(tmp_path / "full")
    quantize(tmp_path / "full", recipe="deltaquant-w4a4", out=tmp_path / "quantized", prompts=["red"])
    kinds = linears_by_kind({"transformer": load_pipeline(tmp_path / "quantized", dtype="float32").transformer})
    assert any(linear.needs_grid for linears in kinds.values() for linear in linears.values())
    (first, _) = kind_errors({"transformer": pipe.transformer}, kinds, trajectory)
    assert all(0 < value < 1 for value in first.values())


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("blocks.3.attn1.to_q", "blocks.*.attn1.to_q"),
        ("transformer_2.blocks.12.ffn.net.2", "transformer_2.blocks.*.ffn.net.2"),
        ("proj_out", "proj_out"),
        ("time_embedding.linear_1", "time_embedding.linear_1"),
    ],
)
def test_a_pattern_replaces_the_index_of_the_block_alone(name, pattern):
    assert pattern_of(name) == pattern


@pytest.mark.slow
def test_an_evaluation_has_the_kinds_with_the_largest_error_first(folders, student, errors):
    full, quantized = folders
    settings = {"num_inference_steps": 2, "guidance_scale": 4.0, "seeds": [0, 3], "workers": 1}
    stages = []
    result = evaluate(
        quantized,
        reference=full,
        prompts=["red", "blue"],
        sensitivity=1,
        dtype="float32",
        progress=lambda stage, done, total: stages.append((stage, done, total)),
        **settings,
    )
    kinds = result["sensitivity"]["kinds"]
    assert {kind["linears"]: kind["count"] for kind in kinds} == {
        name: len(names) for name, names in linears_by_kind({"transformer": student}).items()
    }
    means = [kind["mean"] for kind in kinds]
    assert means == sorted(means, reverse=True)
    assert result["sensitivity"]["n_videos"] == 1
    for kind in kinds:
        assert kind["mean"] == pytest.approx(errors[0][kind["linears"]], rel=1e-3), "of the first prompt"
    assert ("sensitivity", 2 * len(kinds), 2 * len(kinds)) in stages
    without = evaluate(quantized, reference=full, prompts=["red", "blue"], dtype="float32", **settings)
    assert "sensitivity" not in without
    assert result["metrics"] == without["metrics"]


def test_models_that_cannot_be_measured_are_refused_before_anything_is_generated(folders, pipe):
    full, quantized = folders
    options = {"prompts": ["red"], "seeds": [0], "sensitivity": 1, "progress": pytest.fail}
    for model in (full, pipe):
        with pytest.raises(InvalidInputError, match="sensitivity needs a model that s2q quantized"):
            evaluate(model, reference=full, **options)
    for reference in (quantized, load_pipeline(quantized)):
        with pytest.raises(InvalidInputError, match="sensitivity needs a full-precision reference"):
            evaluate(quantized, reference=reference, **options)


def test_kinds_are_averaged_over_prompts():
    counts = {"a": 1, "blocks.*.b": 2}
    videos = [{"a": 0.1, "blocks.*.b": 0.5}, {"a": 0.3, "blocks.*.b": 0.7}]
    entry = summarise_kinds(counts, ["red", "blue"], videos)
    assert [(kind["linears"], kind["count"]) for kind in entry["kinds"]] == [("blocks.*.b", 2), ("a", 1)]
    assert [kind["mean"] for kind in entry["kinds"]] == pytest.approx([0.6, 0.2])
    assert entry["n_videos"] == 2
    assert summarise_kinds(counts, [], []) is None
