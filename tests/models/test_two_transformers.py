"""Pipelines whose steps two transformers share, as Wan 2.2 A14B's: both are quantized, each on what it sees."""

import copy
import json
import re
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, WanImageToVideoPipeline, WanPipeline
from safetensors.torch import load_file

import s2q
from overrides import overriding
from s2q.checkpoint import file_tensors, inspect_checkpoint, read_config
from s2q.cli.output import show_plan
from s2q.common.errors import InvalidInputError
from s2q.evaluation.evaluate import evaluate
from s2q.evaluation.velocity import velocity_errors
from s2q.generation.load import load_pipeline
from s2q.generation.settings import resolve_settings
from s2q.generation.sharing import steps_of_transformers
from s2q.generation.trajectory import record_trajectory
from s2q.nn import PackedLinear
from s2q.planning import plan
from s2q.run import runner, stages
from tiny import tiny_pipeline

BOUNDARY = 0.7
FIRST, SECOND = [999, 900, 750], [500]  # the timesteps of four steps
PROMPTS = ["red", "a blue square"]
SIZE = {"num_frames": 9, "height": 16, "width": 16}
SETTINGS = {**SIZE, "num_inference_steps": 4}
SMALL = [
    "calibration.steps=4",
    "calibration.samples=2",
    "distillation.epochs=1",
    *(f"calibration.{name}={value}" for name, value in SIZE.items()),
]
COMPONENTS = ("transformer", "transformer_2")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def two(**arguments):
    return tiny_pipeline("wan 2.2 a14b", **{"boundary_ratio": BOUNDARY, **arguments})


def calibrated(model, out, *overrides, **arguments):
    return s2q.quantize(
        model, recipe="s2q-w4a6", out=out, prompts=PROMPTS, overrides=overriding(SMALL, overrides), **arguments
    )


def state_bytes(transformer):
    return sum(tensor.nbytes for tensor in file_tensors(transformer).values())


def weights(folder):
    return {component: (folder / component / WEIGHTS).read_bytes() for component in COMPONENTS}


def latents(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("red", **SETTINGS, generator=generator, output_type="latent").frames


def same_tensors(first, second):
    """Require the same parameters and buffers, bit for bit."""
    tensors = [{**dict(one.named_parameters()), **dict(one.named_buffers())} for one in (first, second)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        assert tensor.dtype == tensors[1][name].dtype, name
        assert torch.equal(tensor, tensors[1][name]), name


def in_new_memory(pipe):
    """Move the tensors of the transformers from the pages of files into memory that torch aligns, in place."""
    for name in COMPONENTS:
        for tensor in (*getattr(pipe, name).parameters(), *getattr(pipe, name).buffers()):
            tensor.data = tensor.data.clone()
    return pipe


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    two().save_pretrained(folder)
    return folder


class Spy:
    """What a run did: the pipeline that it wrote, and each stream's timesteps, in order, with its closing."""

    def __init__(self, patch):
        self.pipe, self.heard = None, []
        save, stream, spy = stages.save_checkpoint, runner.TeacherStream, self

        class Stream(stream):
            def __init__(self, *args, calls, timesteps, component, **arguments):
                seen = [sorted(int(call()["timestep"]) for call in own) for own in (calls, timesteps)]
                spy.heard.append((component, *seen))
                super().__init__(*args, calls=calls, timesteps=timesteps, component=component, **arguments)

            def close(self):
                spy.heard.append("closed")
                super().close()

        def kept(pipe, *args, **arguments):
            self.pipe = pipe
            save(pipe, *args, **arguments)

        patch.setattr(stages, "save_checkpoint", kept)
        patch.setattr(runner, "TeacherStream", Stream)


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """A calibrated run: its output, its report, and what it did."""
    out = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        spy = Spy(patch)
        return out, calibrated(model, out), spy


@pytest.fixture
def stop_after(monkeypatch):
    """Names of the blocks that are computed; a run stops before it computes more than it may."""
    state = {"computed": [], "limit": None}
    original = runner.quantize_block

    def counted(task):
        if state["limit"] is not None and len(state["computed"]) == state["limit"]:
            raise KeyboardInterrupt
        state["computed"].append(task.linears[0].name.partition(".attn1")[0])
        return original(task)

    monkeypatch.setattr(runner, "quantize_block", counted)
    return state


def interrupted(state, limit, work):
    state["limit"] = limit
    with pytest.raises(KeyboardInterrupt):
        work()
    state.update(limit=None, computed=[])


@pytest.mark.parametrize("overrides", [[], ["outer.num_bits=8"]], ids=["blocks", "outer"])
def test_the_plan_lists_the_linears_of_both_and_the_bytes_on_disk(model, tmp_path, overrides):
    alone = tiny_pipeline("wan")
    alone.save_pretrained(tmp_path / "alone")
    of_first = plan(tmp_path / "alone", recipe="rtn-w4a6", overrides=overrides)
    planned = plan(model, recipe="rtn-w4a6", overrides=overrides)
    count = len(of_first.layers)
    assert planned.layers[:count] == of_first.layers
    second = [layer.name for layer in planned.layers[count:]]
    inner = [name.removeprefix("transformer_2.") for name in second]
    one_block = [layer.name for layer in of_first.layers if not layer.name.startswith("blocks.1.")]
    assert (inner, [f"transformer_2.{name}" for name in inner]) == (one_block, second)
    s2q.quantize(model, recipe="rtn-w4a6", out=tmp_path / "out", overrides=overrides)
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out")
    on_disk = state_bytes(loaded.transformer) + state_bytes(loaded.transformer_2)
    assert on_disk == planned.storage["quantized_bytes"]
    assert planned.storage["full_precision_bytes"] == 2 * sum(
        parameter.numel() for one in (two().transformer, two().transformer_2) for parameter in one.parameters()
    )
    inspected = inspect_checkpoint(tmp_path / "out", verify=True)
    assert inspected.verified
    assert {layer.name: layer for layer in inspected.layers} == {layer.name: layer for layer in planned.layers}
    assert inspected.storage["quantized_bytes"] == on_disk
    assert inspected.storage["full_precision_bytes"] == planned.storage["full_precision_bytes"]


def test_tables_group_the_blocks_of_each(model, capsys):
    show_plan(plan(model, recipe="rtn-w4a6").to_dict())
    shown = capsys.readouterr().out
    assert re.search(r" blocks\.\*\.attn1\.to_q +2 ", shown)
    assert re.search(r" transformer_2\.blocks\.\*\.attn1\.to_q +1 ", shown)


def test_each_is_rounded_as_it_would_be_alone(model, tmp_path):
    report = s2q.quantize(model, recipe="rtn-w4a6", out=tmp_path / "both")
    assert [block.index for block in report.blocks] == [0, 1, 2]
    assert [block.name for block in report.blocks] == ["blocks.0", "blocks.1", "transformer_2.blocks.0"]
    assert "transformer_2.blocks.0.attn1.to_q" in report.blocks[2].layers
    for component in COMPONENTS:
        pipe = two()
        pipe.register_modules(transformer=getattr(pipe, component), transformer_2=None)
        s2q.quantize(pipe, recipe="rtn-w4a6", out=tmp_path / component)
        expected, found = (
            load_file(folder / WEIGHTS)
            for folder in (tmp_path / component / "transformer", tmp_path / "both" / component)
        )
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        config = json.loads((tmp_path / "both" / component / "config.json").read_text())["quantization_config"]
        assert (
            config == json.loads((tmp_path / component / "transformer/config.json").read_text())["quantization_config"]
        )


@torch.no_grad()
def test_recorded_calls_know_their_transformer(model):
    pipe = DiffusionPipeline.from_pretrained(model)
    settings = resolve_settings(pipe, requested=SETTINGS)
    trajectory = record_trajectory(pipe, PROMPTS, seeds=[0, 1], settings=settings)
    called = {name: [call for call in trajectory.calls if call.transformer == name] for name in COMPONENTS}
    assert [[call.timestep for call in called[name]] for name in COMPONENTS] == [FIRST, SECOND]
    assert steps_of_transformers(pipe, settings) == {name: len(calls) for name, calls in called.items()}
    for name, calls in called.items():
        for call in calls:
            assert len(call.output) == 4  # two videos, two branches
            torch.testing.assert_close(getattr(pipe, name)(**call.inputs, return_dict=False)[0], call.output)
    assert not any(getattr(pipe, name)._forward_hooks for name in COMPONENTS)


def test_each_is_calibrated_on_the_timesteps_it_sees(run):
    out, report, spy = run
    (first, samples, timesteps), closed, (second, samples_2, timesteps_2), closed_2 = spy.heard
    assert (first, second, closed, closed_2) == (*COMPONENTS, "closed", "closed")  # one stream at a time
    assert (timesteps, timesteps_2) == ([], [])  # of adaLN linears, which Wan does not have
    assert set(samples) <= set(FIRST)
    assert set(samples_2) <= set(SECOND)
    assert (len(samples), len(samples_2)) == (2, 2)
    for name, steps in (("", FIRST), ("transformer_2.", SECOND)):
        record = json.loads((out / f"s2q/{name}selection.json").read_text())
        candidates = record["candidates"]
        assert [one["timestep"] for one in candidates] == steps * len(PROMPTS)
        taken = sorted(one["timestep"] for one in candidates if one["selected"])
        assert taken == (samples_2 if name else samples)
        assert record["samples"] == len(taken) == 2
        for score in ("diffusion_salience", "quantization_salience"):
            assert {min(one[score] for one in candidates), max(one[score] for one in candidates)} == {0, 1}
        assert (out / f"s2q/{name}selection.png").read_bytes().startswith(b"\x89PNG")
    assert (report.selection["samples"], report.selection["candidates"]) == (4, 8)
    assert [call.startswith("transformer_2.") for call in report.selection["calls"]] == [False, False, True, True]


def test_what_is_written_generates_what_was_computed(run):
    out, report, spy = run
    assert all(block.loss["final"] < block.loss["rtn"] for block in report.blocks)
    planned = {layer["name"]: layer["bytes"] for layer in report.layers}
    assert {layer.name: layer.bytes for layer in inspect_checkpoint(out, verify=True).layers} == planned
    loaded = DiffusionPipeline.from_pretrained(out)
    for name in COMPONENTS:
        same_tensors(getattr(loaded, name), getattr(spy.pipe, name))
        packed = {inner for inner, one in getattr(loaded, name).named_modules() if isinstance(one, PackedLinear)}
        assert packed == set(read_config(out, name).layers)
    assert len(planned) == len(read_config(out).layers) + len(read_config(out, "transformer_2").layers)
    found, full = latents(loaded), latents(two())
    # products of one row depend on where in memory a weight begins, which a file decides
    assert torch.equal(latents(in_new_memory(loaded)), latents(in_new_memory(spy.pipe)))
    assert 0 < float((found - full).norm() / full.norm()) < 0.1
    mixed = two()
    mixed.register_modules(transformer=loaded.transformer)
    assert not torch.equal(latents(mixed), found)  # the second one matters too


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 2])
def test_a_killed_run_goes_on_with_the_same_result(model, run, tmp_path, monkeypatch, stop_after, limit):
    out = tmp_path / "out"
    interrupted(stop_after, limit, lambda: calibrated(model, out))
    monkeypatch.setattr("s2q.calibration.candidates.record_trajectory", None)  # nothing is generated again
    report = calibrated(model, out)
    assert stop_after["computed"] == ["blocks.0", "blocks.1", "transformer_2.blocks.0"][limit:]
    assert [block.resumed for block in report.blocks] == [index < limit for index in range(3)]
    assert weights(out) == weights(run[0])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "computed"),
    [
        (lambda pipe: None, []),
        (lambda pipe: pipe.transformer_2.blocks[0].ffn.net[2].weight[0, 0].add_(1), ["transformer_2.blocks.0"]),
        (lambda pipe: pipe.transformer.blocks[0].ffn.net[2].weight[0, 0].add_(1), ["blocks.0"]),
    ],
)
def test_only_blocks_with_other_weights_are_rounded_again(model, tmp_path, monkeypatch, stop_after, change, computed):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("s2q.checkpoint.save.write_manifest", lambda staged: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            s2q.quantize(model, recipe="rtn-w4a6", out=out)
    names = {path.name for path in (tmp_path / ".out.s2q-run").glob("*.safetensors")}
    assert names == {f"{name}.safetensors" for name in ("block-000", "block-001", "transformer_2.block-000")}
    stop_after["computed"].clear()
    pipe = DiffusionPipeline.from_pretrained(model)
    with torch.no_grad():
        change(pipe)
    s2q.quantize(pipe, recipe="rtn-w4a6", out=out)
    assert stop_after["computed"] == computed


@pytest.mark.slow
def test_another_boundary_is_another_calibration(model, tmp_path, stop_after):
    out = tmp_path / "out"
    interrupted(stop_after, 2, lambda: calibrated(model, out))
    other = shutil.copytree(model, tmp_path / "other")
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": 0.8}))
    calibrated(other, out)
    assert len(stop_after["computed"]) == 3
    record = json.loads((out / "s2q/transformer_2.selection.json").read_text())
    assert {one["timestep"] for one in record["candidates"]} == {750, 500}


@pytest.mark.parametrize(
    ("boundary", "idle", "skip"), [(0.0, "transformer_2", "transformer_2.blocks.*"), (1.0, "transformer", "blocks.*")]
)
def test_a_transformer_that_is_never_called_cannot_be_calibrated(tmp_path, boundary, idle, skip):
    pipe, out = two(boundary_ratio=boundary), tmp_path / "out"
    with pytest.raises(
        InvalidInputError, match=rf"{idle} is not called in any of the 4 steps .*={boundary}\)"
    ) as caught:
        calibrated(pipe, out)
    assert not list(tmp_path.iterdir())
    assert f"skip=['{skip}']" in str(caught.value)
    report = calibrated(pipe, out, f"skip=['{skip}']")
    assert {layer["scheme"] for layer in report.layers} == {"w4a6", "w8a16", "fp32"}
    s2q.quantize(pipe, recipe="rtn-w4a6", out=out, overwrite=True)


def test_samples_are_counted_for_each_transformer(model, tmp_path):
    with pytest.raises(InvalidInputError, match=r"samples=3, but 2 prompts with 1 steps of transformer_2 give only 2"):
        calibrated(model, tmp_path / "out", "calibration.samples=3")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("left", COMPONENTS)
def test_one_of_the_two_can_be_left_as_it_is(model, tmp_path, left):
    kept = COMPONENTS.index(left)
    skip, done = ["blocks.*", "transformer_2.*"][kept], COMPONENTS[1 - kept]
    planned = plan(model, recipe="rtn-w4a6", overrides=[f"skip=['{skip}']"])
    s2q.quantize(model, recipe="rtn-w4a6", out=tmp_path / "out", overrides=[f"skip=['{skip}']"])
    assert (tmp_path / "out" / left / WEIGHTS).read_bytes() == (model / left / WEIGHTS).read_bytes()
    assert "quantization_config" not in json.loads((tmp_path / "out" / left / "config.json").read_text())
    inspected = inspect_checkpoint(tmp_path / "out", verify=True)
    assert inspected.storage["quantized_bytes"] == planned.storage["quantized_bytes"]
    assert {layer.name.startswith("transformer_2.") for layer in inspected.layers} == {done == "transformer_2"}
    loaded = load_pipeline(tmp_path / "out")
    packed = {name for name in COMPONENTS for one in getattr(loaded, name).modules() if isinstance(one, PackedLinear)}
    assert packed == {done}
    with pytest.raises(InvalidInputError, match="is already quantized"):
        plan(tmp_path / "out", recipe="rtn-w4a6")


def test_without_a_second_transformer_nothing_is_left_to_it(tmp_path):
    pipe = two()
    pipe.register_modules(transformer_2=None)
    with pytest.raises(
        InvalidInputError, match=r"WanPipeline: boundary_ratio=0\.7 leaves 1 of 4 steps to a transformer_2"
    ):
        calibrated(pipe, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    pipe.register_to_config(boundary_ratio=None)
    report = calibrated(pipe, tmp_path / "out")
    assert [block.name for block in report.blocks] == ["blocks.0", "blocks.1"]
    assert report.selection["candidates"] == 8


def test_eval_measures_every_step(model, run):
    result = evaluate(str(run[0]), reference=str(model), prompts=PROMPTS, seeds=[0], **SETTINGS)
    assert 0 < result["metrics"]["velocity_relative_error"]["mean"] < 0.5
    assert [step["timestep"] for step in result["velocity"]["steps"]] == FIRST + SECOND
    assert min(step["mean"] for step in result["velocity"]["steps"]) > 0
    alone = tiny_pipeline("wan")
    with pytest.raises(InvalidInputError, match="has transformer, the reference .* has transformer and transformer_2"):
        evaluate(alone, reference=str(model), prompts=PROMPTS, seeds=[0], **SETTINGS)


def test_a_call_is_answered_by_the_transformer_that_was_called(model, run):
    pipe, quantized = DiffusionPipeline.from_pretrained(model), load_pipeline(run[0])
    trajectory = record_trajectory(pipe, ["red"], seeds=[0], settings=resolve_settings(pipe, requested=SETTINGS))
    for replaced, steps in (("transformer", [True, True, True, False]), ("transformer_2", [False, False, False, True])):
        students = {name: getattr(pipe, name) for name in COMPONENTS} | {replaced: getattr(quantized, replaced)}
        (errors,) = velocity_errors(students, trajectory)
        assert [error > 1e-6 for error in errors] == steps
        assert max(errors) < 0.1


def test_options_of_loading_reach_both(run):
    loaded = load_pipeline(run[0], backend="reference", dtype="bfloat16")
    for name in COMPONENTS:
        transformer = getattr(loaded, name)
        assert {one.backend for one in transformer.modules() if isinstance(one, PackedLinear)} == {"reference"}
        assert transformer.dtype == torch.bfloat16


def test_damage_of_the_second_is_found(run, tmp_path):
    copied = shutil.copytree(run[0], tmp_path / "copy")
    path = copied / "transformer_2" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InvalidInputError, match=rf"transformer_2/{WEIGHTS}: truncated"):
        inspect_checkpoint(copied)
    (problem,) = inspect_checkpoint(copied, verify=True).problems
    assert problem.startswith(f"transformer_2/{WEIGHTS}: got")
    with pytest.raises(InvalidInputError, match=f"transformer_2/{WEIGHTS}"):
        load_pipeline(copied)
    (copied / "transformer_2/config.json").unlink()
    with pytest.raises(InvalidInputError, match=r"no transformer_2/config\.json"):
        inspect_checkpoint(copied)


def test_messages_name_the_second(tmp_path):
    pipe = two()
    with torch.no_grad():
        pipe.transformer_2.blocks[0].ffn.net[2].weight[0, 0] = float("nan")
    with pytest.raises(InvalidInputError, match=r"transformer_2\.blocks\.0\.ffn\.net\.2\.weight contains 1 NaN"):
        s2q.quantize(pipe, recipe="rtn-w4a6", out=tmp_path / "out")
    pipe = two()
    pipe.transformer_2.to(torch.bfloat16)
    with pytest.raises(InvalidInputError, match=r"transformer is loaded in torch\.float32 and its transformer_2 in"):
        s2q.quantize(pipe, recipe="rtn-w4a6", out=tmp_path / "out")


def test_the_card_counts_the_linears_of_both(model, tmp_path):
    report = s2q.quantize(model, recipe="rtn-w4a6", out=tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert f"| Quantized linears | {len(report.layers)} |" in card
    schemes = [layer["scheme"] for layer in report.layers]
    assert f"w4a6 ({schemes.count('w4a6')})" in card
    assert f"w8a16 ({schemes.count('w8a16')})" in card


def test_image_to_video_with_two_transformers(tmp_path):
    one = tiny_pipeline("wan image")
    parts = one.components | {"transformer_2": copy.deepcopy(one.transformer), "boundary_ratio": BOUNDARY}
    WanImageToVideoPipeline(**parts).save_pretrained(tmp_path / "model")
    planned = plan(tmp_path / "model", recipe="rtn-w4a6")
    s2q.quantize(tmp_path / "model", recipe="rtn-w4a6", out=tmp_path / "out")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(loaded, WanImageToVideoPipeline)
    assert state_bytes(loaded.transformer) + state_bytes(loaded.transformer_2) == planned.storage["quantized_bytes"]
    assert "transformer_2.blocks.1.attn2.add_v_proj" in {layer.name for layer in planned.layers}


def test_a_pipeline_is_still_a_plain_one_after_a_run(model, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(model)
    before = latents(pipe)
    s2q.quantize(pipe, recipe="rtn-w4a6", out=tmp_path / "out")
    assert type(pipe) is WanPipeline
    assert torch.equal(latents(pipe), before)
