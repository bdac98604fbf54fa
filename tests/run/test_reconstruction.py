import json
import re
import shutil

import pytest
import torch
from diffusers import CogVideoXPipeline
from safetensors.torch import load_file, save_file

from overrides import overriding
from quick import slow
from s2q.checkpoint import inspect_checkpoint, load_pipeline
from s2q.checkpoint.manifest import write_manifest
from s2q.common.errors import InvalidInputError
from s2q.distillation.attention_profile import ImportanceMap
from s2q.planning import plan
from s2q.recipes.load import load_recipe
from s2q.run import runner
from s2q.run.quantize import quantize
from s2q.transforms import Transform
from tiny import run_transformer, split_input, tiny_pipeline

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
PROMPTS = ["a red circle", "a blue square"]
LEARNED = ["rounding.method=adaround", "distillation.epochs=1"]
SMALL = ["calibration.steps=2", "calibration.samples=3", "distillation.epochs=2"]


def small(out, *, pipe=None, overrides=(), recipe="s2q-w4a6", prompts=PROMPTS, **arguments):
    pipe = tiny_pipeline("cogvideox") if pipe is None else pipe
    return quantize(pipe, recipe=recipe, out=out, prompts=prompts, overrides=overriding(SMALL, overrides), **arguments)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An uninterrupted run of the whole method: its output and its report."""
    out = tmp_path_factory.mktemp("run") / "out"
    seen = []
    return out, small(out, progress=lambda *step: seen.append(step)), seen


def test_a_block_is_better_than_rounding_and_distillation_never_hurts(run):
    for block in run[1].blocks:
        assert block.loss["final"] < block.loss["rtn"]
        assert block.loss["distilled"] <= block.loss["initial"]
        assert set(block.rounding) == set(block.layers)
        assert all(one["error"] <= one["rtn_error"] for one in block.rounding.values())


def test_progress_names_each_block_in_work_and_ends_it(run):
    _, report, seen = run
    for block in report.blocks:
        steps = [(done, total) for stage, done, total in seen if stage == f"blocks: {block.name}"]
        assert steps[0][0] == 1
        assert steps[-1][0] == steps[-1][1] > 1
        assert steps == sorted(steps)
    named = {stage.removeprefix("blocks: ") for stage, _, _ in seen if stage.startswith("blocks: ")}
    assert named == {block.name for block in report.blocks}


def test_what_is_written_is_what_was_computed(run):
    out, report, _ = run
    pipe = load_pipeline(out)
    packed = run_transformer(pipe.transformer)
    full = run_transformer(tiny_pipeline("cogvideox").transformer)
    assert float((packed - full).square().mean() / full.square().mean()) < 1e-2
    inspected = inspect_checkpoint(out, verify=True)
    assert inspected.verified
    assert inspected.format_version == 4
    assert inspected.storage["quantized_bytes"] == report.storage["quantized_bytes"]
    planned = {layer["name"]: layer["bytes"] for layer in report.layers}
    assert {layer.name: layer.bytes for layer in inspected.layers} == planned


def test_a_loaded_checkpoint_saved_again_is_the_same(run, tmp_path):
    pipe = load_pipeline(run[0])
    pipe.save_pretrained(tmp_path / "again")
    first, second = load_file(run[0] / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_casting_keeps_transforms_in_fp32_and_dequantizing_keeps_the_function(run):
    transformer = load_pipeline(run[0]).transformer
    layer = transformer.transformer_blocks[0].attn1.to_q
    x = torch.randn(5, 64)
    expected = torch.nn.functional.linear(split_input(layer, x)[0], layer.dequantized_weight(torch.float32), layer.bias)
    actual = torch.nn.functional.linear(x, layer.effective_weight(torch.float32), layer.bias)
    assert torch.allclose(expected, actual, atol=1e-5)
    layer.to(torch.bfloat16)
    assert {layer.transform_scale.dtype, layer.transform_left.dtype, layer.activation_clip.dtype} == {torch.float32}
    plain = transformer.dequantize()
    assert type(plain.transformer_blocks[0].attn1.to_q) is torch.nn.Linear


def test_a_run_records_selection_and_blocks(run):
    out, report, seen = run
    record = json.loads((out / "s2q/selection.json").read_text())
    assert len(record["candidates"]) == 4
    assert sum(one["selected"] for one in record["candidates"]) == record["samples"] == 3
    for one in record["candidates"]:
        product = one["diffusion_salience"] * one["quantization_salience"]
        assert one["salience"] == pytest.approx(product)
    assert (out / "s2q/selection.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((out / "s2q/report.json").read_text())
    assert saved == json.loads(json.dumps(report.to_dict()))
    assert [stage["name"] for stage in report.stages] == ["load", "collect", "select", "blocks", "assemble"]
    events = [json.loads(line) for line in (out / "s2q/events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["run", "collect", "select", "block", "block", "assemble"]
    assert events[3]["loss"] == dict(report.blocks[0].loss)
    assert "attention" not in events[3], "the report has it"
    blocks = [done for stage, done, _ in seen if stage == "blocks"]
    assert blocks == sorted(blocks)
    assert blocks[-1] == 8  # two blocks of two epochs and two units around them
    assert not list(out.parent.glob(".*"))


def test_the_report_has_the_attention_of_each_block_at_full_precision(run):
    _, report, _ = run
    for block in report.blocks:
        record, shown = block.attention, ImportanceMap.from_dict(block.attention["map"])
        assert record["samples"] == 3
        assert record["tokens"] == 16 + 3  # text, then three frames of a patch each
        assert record["mass"] == sorted(record["mass"])
        assert all(mass >= fraction - 1e-5 for fraction, mass in zip(record["fractions"], record["mass"], strict=True))
        assert 0 < record["text_share"] < 1
        assert shown.grid == (3, 1, 1)
        assert float(shown.values.mean()) == pytest.approx(1.0, abs=0.01)
        assert ", step 1, " in shown.sample, "the latest of both steps"


def test_a_recipe_that_weights_tokens_alike_records_no_attention(tmp_path):
    report = small(tmp_path / "out", overrides=["loss.weighting=uniform", "distillation.epochs=1"])
    assert [block.attention for block in report.blocks] == [None, None]


def test_two_runs_are_bit_identical_and_other_seeds_differ(run, tmp_path):
    small(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (run[0] / WEIGHTS).read_bytes()
    small(tmp_path / "other", seed=1)
    assert (tmp_path / "other" / WEIGHTS).read_bytes() != (run[0] / WEIGHTS).read_bytes()


def test_a_killed_run_goes_on_with_the_same_result(run, tmp_path, monkeypatch, interrupt):
    with interrupt():
        small(tmp_path / "out")
    with monkeypatch.context() as patch:  # nothing is generated again
        patch.setattr("s2q.calibration.candidates.record_trajectory", None)
        report = small(tmp_path / "out")
    assert [block.resumed for block in report.blocks] == [True, False]
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (run[0] / WEIGHTS).read_bytes()


def files_of(out):
    """Every file of a checkpoint except those that have the time of the run in them."""
    timed = {"s2q/report.json", "s2q/events.jsonl", "s2q/manifest.json", "README.md"}
    files = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert timed <= files.keys()
    return {name: content for name, content in files.items() if name not in timed}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["cogvideox", "wan"])
@pytest.mark.parametrize("recipe", ["s2q-w4a6", "rtn-w4a6"])
def test_every_file_of_a_resumed_run_is_that_of_an_undisturbed_one(tmp_path, interrupt, model, recipe):
    tiny_pipeline(model).save_pretrained(tmp_path / "model")
    size = ["calibration.num_frames=9", "calibration.height=16", "calibration.width=16"]
    overrides = overriding(SMALL, size) if recipe == "s2q-w4a6" else []
    arguments = {"recipe": recipe, "prompts": PROMPTS, "overrides": overrides}
    with interrupt():
        quantize(tmp_path / "model", out=tmp_path / "out", **arguments)
    quantize(tmp_path / "model", out=tmp_path / "out", **arguments)
    quantize(tmp_path / "model", out=tmp_path / "whole", **arguments)
    resumed, whole = files_of(tmp_path / "out"), files_of(tmp_path / "whole")
    assert "tokenizer/tokenizer.json" in whole
    assert resumed.keys() == whole.keys()
    assert [name for name in whole if resumed[name] != whole[name]] == []


def test_a_tokenizer_that_has_been_used_is_saved_as_a_fresh_one_and_left_as_it_was(tmp_path):
    pipe, fresh = tiny_pipeline("cogvideox"), tiny_pipeline("cogvideox")
    pipe.tokenizer("a", padding="max_length", max_length=7, truncation=True)
    before = (pipe.tokenizer.backend_tokenizer.padding, pipe.tokenizer.backend_tokenizer.truncation)
    assert None not in before
    for name, one in {"used": pipe, "fresh": fresh}.items():
        quantize(one, recipe="rtn-w4a6", out=tmp_path / name)
    assert files_of(tmp_path / "used") == files_of(tmp_path / "fresh")
    assert (pipe.tokenizer.backend_tokenizer.padding, pipe.tokenizer.backend_tokenizer.truncation) == before


def test_a_killed_run_leaves_no_activations_on_the_disk(tmp_path, monkeypatch):
    original, computed = runner.quantize_block, []

    def killing(task):
        if computed:
            assert list((tmp_path / ".out.s2q-run").glob("process-*-stream-*.safetensors"))
            raise KeyboardInterrupt
        computed.append(1)
        return original(task)

    monkeypatch.setattr(runner, "quantize_block", killing)
    with pytest.raises(KeyboardInterrupt):
        small(tmp_path / "out", memory_budget=1)
    left = [path.name for path in (tmp_path / ".out.s2q-run").iterdir()]
    assert not [name for name in left if name.startswith("stream-")]
    assert "block-000.safetensors" in left


def test_learned_rounding_goes_on_with_the_same_result_and_is_what_is_packed(tmp_path, interrupt):
    arguments = {"recipe": "ptq4dit-w4a4", "overrides": ["distillation.rounding_lr=0.1", "distillation.epochs=8"]}
    whole = small(tmp_path / "whole", **arguments)
    with interrupt():
        small(tmp_path / "out", **arguments)
    report = small(tmp_path / "out", **arguments)
    assert [block.resumed for block in report.blocks] == [True, False]
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    for block in whole.blocks:
        assert block.loss["distilled"] < block.loss["initial"]
        assert block.loss["final"] == pytest.approx(block.loss["distilled"], rel=1e-3)
        learned = [one for name, one in block.rounding.items() if "norm" not in name]
        assert all(0 < one["changed"] < 0.5 and 0 <= one["undecided"] <= 1 for one in learned)
        assert all("error" in one for name, one in block.rounding.items() if "norm" in name)  # by GPTQ
    assert torch.isfinite(run_transformer(load_pipeline(tmp_path / "out").transformer)).all()


def test_a_block_does_not_depend_on_the_others(run, tmp_path):
    small(tmp_path / "alone", overrides=["skip=['transformer_blocks.0.*']"])
    alone, whole = load_file(tmp_path / "alone" / WEIGHTS), load_file(run[0] / WEIGHTS)
    names = [name for name in whole if name.startswith("transformer_blocks.1.")]
    assert names
    assert all(torch.equal(alone[name], whole[name]) for name in names)


@pytest.mark.parametrize(
    "overrides",
    [
        ["transforms.scale=smooth", "rounding.method=gptq"],
        ["transforms.scale=smooth", "transforms.rotation=kronecker", "distillation.epochs=1", "rounding.method=gptq"],
        [*LEARNED, "transforms.scale=smooth", "transforms.learn_scale=false"],
    ],
)
def test_the_transform_of_an_input_is_rounded_once(tmp_path, monkeypatch, overrides):
    rounded, calls = Transform.rounded, []
    monkeypatch.setattr(Transform, "rounded", lambda transform: calls.append(transform) or rounded(transform))
    pipe = tiny_pipeline("cogvideox", num_layers=1)
    small(tmp_path / "out", pipe=pipe, recipe="rtn-w4a6", overrides=overrides)
    assert len(calls) == 4, "q, k and v; out; both of the feed-forward"


@pytest.mark.parametrize(
    "part",
    [
        ["rounding.method=gptq"],
        ["transforms.shift=mean"],
        slow(["transforms.shift=mean", "transforms.rotation=hadamard", "rounding.method=gptq", "activations=null"]),
        ["transforms.scale=smooth"],
        ["transforms.low_rank=1"],
        slow(["transforms.low_rank=2", "transforms.low_rank_from=weight", "transforms.shift=mean", "activations=null"]),
        ["transforms={low_rank: 2, low_rank_from: both, shift: mean, rotation: hadamard}", "rounding.method=gptq"],
        [
            "transforms={scale: smooth, alpha: search, rotation: kronecker, low_rank: 2, low_rank_from: weight}",
            "distillation.epochs=1",
            "rounding.method=gptq",
        ],
        slow(["transforms.low_rank=99", "transforms.shift=mean", "transforms.rotation=hadamard", "activations=null"]),
        slow(["transforms.rotation=hadamard", "rounding.method=gptq"]),
        ["transforms.rotation=hadamard", "clip.constant=0.9", "modulation.rounding=gptq"],
        ["clip.weights=true", "clip.activations=true", "distillation.epochs=1"],
        slow(["transforms.rotation=kronecker", "transforms.start=random", "distillation.epochs=1", "activations=null"]),
        ["transforms.scale=smooth", "transforms.salience=spearman"],
        ["rounding.method=adaround", "distillation.epochs=1", "activations=null", "modulation.rounding=gptq"],
        [
            *["rounding.method=adaround", "distillation.epochs=1", "clip.activations=true", "transforms.shift=mean"],
            *["transforms.rotation=hadamard", "transforms.low_rank=2", "weights.granularity=per_group"],
            "weights.group_size=16",
        ],
    ],
)
def test_each_part_of_a_recipe_runs_alone(tmp_path, part):
    overrides = ["calibration.steps=2", "calibration.samples=1", *part]
    report = quantize(
        tiny_pipeline("cogvideox", num_layers=1),
        recipe="rtn-w4a6",
        out=tmp_path / "out",
        prompts=["a"],
        overrides=overrides,
    )
    assert report.blocks[0].loss["final"] > 0
    assert inspect_checkpoint(tmp_path / "out").storage["quantized_bytes"] == report.storage["quantized_bytes"]
    load_pipeline(tmp_path / "out")


def test_bad_input_is_refused_before_compute(tmp_path):
    cases = [
        ({"prompts": None}, "needs calibration prompts"),
        ({"prompts": []}, "the list is empty"),
        ({"prompts": "a red circle"}, "got one string"),
        ({"prompts": [" "]}, "prompt 1 of 1 is empty"),
        ({"overrides": ["calibration.samples=5"]}, "only 4 candidates"),
        (
            {"overrides": ["calibration.selection=sdss"]},
            r"calibration\.selection='sdss'; expected one of .*; the nearest is sds",
        ),
        ({"overrides": ["transforms.rotation=hadamart"]}, "the nearest is hadamard"),
        ({"overrides": ["transforms.start=hadamar"]}, "the nearest is hadamard"),
        ({"overrides": ["rounding.method=gptp"]}, "the nearest is gptq"),
        ({"overrides": ["loss.lambda_mim=0.2"]}, "nearest keys are loss.lambda_min"),
        ({"overrides": ["loss.lambda_min=2"]}, "lambda_min=2"),
        ({"overrides": ["clip.constant=0.9"]}, "clip.constant=0.9 excludes clip.activations=true"),
    ]
    for arguments, message in cases:
        with pytest.raises(InvalidInputError, match=message):
            small(tmp_path / "out", **arguments)
        assert not list(tmp_path.iterdir()), arguments


def test_parts_that_do_not_fit():
    for overrides, message in [
        (["clip.weights=true"], "need distillation"),
        (["loss.weighting=attention"], "needs distillation"),
        (["distillation.epochs=1"], "nothing to learn"),
        (["activations=null", "clip.constant=0.9"], "need quantized activations"),
        (["transforms.low_rank_from=weight"], "low_rank_from=weight needs a branch; set transforms.low_rank=32"),
        (["transforms.low_rank_from=weights", "transforms.low_rank=2"], "expected one of input, weight, both"),
        (["transforms.alpha=search"], "alpha=search needs a scale; set transforms.scale=smooth"),
        (["transforms.alpha=serch"], "transforms.alpha='serch'; expected 0 to 1, or search"),
        (["transforms.alpha=1.1"], "transforms.alpha=1.1; expected 0 to 1, or search"),
        (["transforms.salience=spearman"], "salience=spearman needs a scale; set transforms.scale=smooth"),
        (["rounding.method=adaround"], "adaround needs distillation"),
        ([*LEARNED, "clip.weights=true"], "set clip.weights=false"),
        ([*LEARNED, "transforms.scale=smooth"], "transforms.learn_scale=false"),
        ([*LEARNED, "transforms.rotation=kronecker"], "transforms.rotation=hadamard"),
        ([*LEARNED, "rounding.beta_end=30"], "beta_end=30.0 is above beta_start=20.0"),
        ([*LEARNED, "rounding.warmup=1"], "rounding.warmup=1"),
        (["modulation.rounding=adaround"], "modulation.rounding='adaround'; expected one of rtn, gptq"),
    ]:
        with pytest.raises(InvalidInputError, match=message):
            load_recipe("rtn-w4a6", overrides=overrides)


def test_nan_names_block_and_sample(tmp_path, monkeypatch):
    from s2q.calibration.stream import TeacherStream

    original = TeacherStream.inputs

    def poisoned(self, sample):
        inputs = original(self, sample)
        if sample == 1 and self._position == 1:
            inputs["hidden_states"] = inputs["hidden_states"] * float("nan")
        return inputs

    monkeypatch.setattr(TeacherStream, "inputs", poisoned)
    message = r"transformer_blocks\.1: its hidden_states for prompt \d, step \d, branch \d contain NaN"
    with pytest.raises(InvalidInputError, match=message):
        small(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_sample_and_a_constant_channel(tmp_path):
    pipe = tiny_pipeline("cogvideox", num_layers=1)
    with torch.no_grad():  # one channel of the input of q, k, v is the same for every token, another one zero
        for channel in (0, 1):
            pipe.transformer.transformer_blocks[0].norm1.norm.weight[channel] = 0
        pipe.transformer.transformer_blocks[0].norm1.norm.bias[1] = 0
    report = small(tmp_path / "out", pipe=pipe, overrides=["calibration.samples=1"])
    assert report.blocks[0].loss["final"] < 1


def test_a_shift_helps_where_inputs_are_off_centre_and_dequantizing_undoes_it(run, tmp_path):
    report = small(tmp_path / "out", overrides=["transforms.shift=mean"])
    assert all(new.loss["final"] < old.loss["final"] for new, old in zip(report.blocks, run[1].blocks, strict=True))
    transformer = load_pipeline(tmp_path / "out").transformer
    layer = transformer.transformer_blocks[0].ff.net[2]
    assert layer.input_shift.shape == (256,)
    x = torch.randn(5, 256)
    expected = torch.nn.functional.linear(split_input(layer, x)[0], layer.dequantized_weight(torch.float32), layer.bias)
    plain = transformer.dequantize().transformer_blocks[0].ff.net[2]
    assert torch.allclose(plain(x), expected, atol=1e-5)


def test_a_low_rank_branch_takes_most_of_the_error_and_everything_about_it_is_stored(run, tmp_path):
    tiny_pipeline("cogvideox").save_pretrained(tmp_path / "model")
    overrides = ["transforms.low_rank=2"]
    report = small(tmp_path / "out", overrides=overrides)
    assert all(new.loss["final"] < old.loss["final"] for new, old in zip(report.blocks, run[1].blocks, strict=True))
    planned = plan(tmp_path / "model", recipe="s2q-w4a6", overrides=overrides, dtype="float32")
    assert planned.storage["quantized_bytes"] == report.storage["quantized_bytes"]
    transformer = load_pipeline(tmp_path / "out").transformer
    block = transformer.transformer_blocks[0]
    layer = block.ff.net[2]
    assert (layer.low_rank_basis.dtype, layer.low_rank_weight.dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(block.attn1.to_q.low_rank_basis, block.attn1.to_k.low_rank_basis)
    x = torch.randn(5, layer.in_features)
    quantized, branch = split_input(layer, x)
    expected = torch.nn.functional.linear(quantized, layer.dequantized_weight(torch.float32), layer.bias) + branch
    plain = transformer.dequantize().transformer_blocks[0].ff.net[2]
    torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)


def test_plan_has_the_stages_and_the_bytes(run, tmp_path):
    tiny_pipeline("cogvideox").save_pretrained(tmp_path / "model")
    planned = plan(tmp_path / "model", recipe="s2q-w4a6", dtype="float32")
    assert [stage.name for stage in planned.stages] == ["collect", "select", "blocks", "assemble"]
    assert planned.storage["quantized_bytes"] == run[1].storage["quantized_bytes"]


def test_activations_beyond_the_budget_go_to_the_disk_and_change_nothing(run, tmp_path, monkeypatch):
    from s2q.common.tensor_store import TensorStore

    spilled = set()
    original = TensorStore.put

    def put(self, index, tensors):
        original(self, index, tensors)
        spilled.update(path.name.split("-")[2] for path in self.folder.glob("process-*-0*.safetensors"))

    monkeypatch.setattr(TensorStore, "put", put)
    small(tmp_path / "out", memory_budget=1)
    assert {"stream", "targets"} <= spilled
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (run[0] / WEIGHTS).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_stores_share_their_memory_and_give_it_back(tmp_path):
    from s2q.common.tensor_store import HostMemory, TensorStore

    memory = HostMemory(200)
    one, other = (TensorStore(tmp_path, name, memory=memory) for name in ("one", "other"))
    wide, narrow = {"x": torch.arange(20.0)}, {"x": torch.arange(15.0)}
    one.put(0, wide)
    other.put(0, wide)  # 160 of the 200 bytes are taken
    other.put(1, narrow)
    assert [path.name for path in tmp_path.iterdir()] == ["other-0001.safetensors"]
    assert all(torch.equal(store.get(index)["x"], x["x"]) for store, index, x in ((other, 0, wide), (other, 1, narrow)))
    one.clear()
    other.put(1, narrow)
    assert (memory.left, list(tmp_path.iterdir())) == (60, [])
    other.clear()
    assert memory.left == 200


def test_a_block_can_be_calibrated_in_the_dtype_of_the_model(tmp_path):
    losses = {}
    for precision in ("float32", "model"):
        report = small(
            tmp_path / precision,
            pipe=tiny_pipeline("cogvideox", dtype=torch.bfloat16),
            overrides=[f"calibration.precision={precision}"],
        )
        losses[precision] = [block.loss for block in report.blocks]
    for wide, half in zip(losses["float32"], losses["model"], strict=True):
        assert half["final"] != wide["final"]
        assert half["final"] < 0.5 * half["rtn"]  # both with the rounding of outputs to bf16 in them


def test_modulation_is_rounded_with_every_timestep_whatever_the_samples(tmp_path):
    """Two runs with different samples round the adaLN linears alike, and not to nearest."""
    weights = []
    steps = "calibration.steps=4"
    for name, changes in {
        "one": [steps, "calibration.selection=ds"],
        "other": [steps, "calibration.selection=qs"],
        "nearest": [steps, "modulation.rounding=rtn"],
    }.items():
        report = small(tmp_path / name, overrides=[*changes, "distillation.epochs=1"])
        tensors = load_file(tmp_path / name / WEIGHTS)
        weights.append({key: value for key, value in tensors.items() if ".norm1.linear.weight" in key})
        assert len(report.selection["calls"]) == 3
    one, other, nearest = weights
    assert len(one) == 4  # codes and scales of two blocks
    assert all(torch.equal(one[key], other[key]) for key in one)
    codes = [key for key in one if key.endswith(".weight")]
    assert not any(torch.equal(one[key], nearest[key]) for key in codes)


TRANSFORMED = "transformer_blocks.1.ff.net.2"


@pytest.mark.parametrize(
    ("tensor", "change", "message"),
    [
        ("transform_left", None, "lacks 1 tensor, {name}"),
        ("activation_clip", None, "lacks 1 tensor, {name}"),
        ("transform_left", lambda t: t[:-1].contiguous(), r"{name}: got shape \["),
        ("transform_scale", lambda t: t[:-1].contiguous(), r"{name}: got shape \[255\], expected \[256\]"),
        ("transform_right", lambda t: t.half(), r"{name}: got dtype torch\.float16, expected torch\.bfloat16"),
        ("transform_scale", lambda t: t * float("nan"), "{name}: contains"),
        ("activation_clip", lambda t: t * 0, "{name}: contains"),
    ],
)
def test_damaged_transforms_are_refused(run, tmp_path, tensor, change, message):
    shutil.copytree(run[0], tmp_path / "copy")
    name = f"{TRANSFORMED}.{tensor}"
    tensors = load_file(tmp_path / "copy" / WEIGHTS)
    value = tensors.pop(name)
    if change is not None:
        tensors[name] = change(value)
    save_file(tensors, tmp_path / "copy" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(InvalidInputError, match=re.escape(WEIGHTS)):
        load_pipeline(tmp_path / "copy")
    write_manifest(tmp_path / "copy")  # as who damages a checkpoint on purpose does
    for load in (CogVideoXPipeline.from_pretrained, load_pipeline):
        with pytest.raises(InvalidInputError, match=message.format(name=name.replace(".", r"\."))):
            load(tmp_path / "copy")


def test_a_layout_that_the_file_does_not_have_is_refused(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "copy")
    path = tmp_path / "copy/transformer/config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["layer_inputs"].pop(TRANSFORMED)
    path.write_text(json.dumps(config))
    write_manifest(tmp_path / "copy")
    with pytest.raises(InvalidInputError, match=TRANSFORMED.replace(".", r"\.")):
        CogVideoXPipeline.from_pretrained(tmp_path / "copy")
