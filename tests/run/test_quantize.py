import json
import logging
import re
import subprocess
import sys
import types

import pytest
import torch
from safetensors.torch import load_file

from s2q.common.errors import (
    BusyError,
    InvalidInputError,
    ResourceError,
    UsageError,
)
from s2q.common.outputs import staged_directory
from s2q.common.run_folder import open_run_folder
from s2q.planning import Machine, Plan, plan
from s2q.run import runner
from s2q.run.quantize import quantize
from s2q.run.report import QuantizationReport
from tiny import tiny_pipeline

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def test_the_report_is_saved_and_progress_names_every_stage(folder, tmp_path):
    seen = []
    report = quantize(
        folder, recipe="rtn-w4a6", out=tmp_path / "out", prompts=["a", "b"], progress=lambda *step: seen.append(step)
    )
    assert isinstance(report, QuantizationReport)
    saved = json.loads((tmp_path / "out/s2q/report.json").read_text())
    assert saved == json.loads(json.dumps(report.to_dict()))
    assert (report.source, report.recipe, report.output, report.dtype) == ("tiny", "rtn-w4a6", "out", "bfloat16")
    assert report.n_prompts == 2
    assert [block.index for block in report.blocks] == [0, 1, 2]
    assert [stage["name"] for stage in report.stages] == ["load", "blocks", "assemble"]
    assert report.peak_memory_bytes > 2**20
    assert seen == [
        *(("load", done, 1) for done in range(2)),
        *(("blocks", done, 3) for done in range(4)),
        *(("assemble", done, 1) for done in range(2)),
    ]


def test_reported_errors_are_those_of_the_stored_weights(folder, tmp_path):
    from s2q.checkpoint import load_pipeline

    report = quantize(folder, recipe="rtn-w4a6", out=tmp_path / "out")
    full = tiny_pipeline("cogvideox", num_layers=3, dtype=torch.bfloat16).transformer.requires_grad_(False)
    packed = load_pipeline(tmp_path / "out").transformer
    for block in report.blocks:
        noise = power = 0.0
        for name, error in block.layers.items():
            weight = full.get_submodule(name).weight.double()
            deviation = packed.get_submodule(name).dequantized_weight(torch.float32).double() - weight
            assert error == pytest.approx(float(deviation.square().sum() / weight.square().sum()), rel=1e-5)
            noise, power = noise + deviation.square().sum(), power + weight.square().sum()
        assert block.weight_relative_error == pytest.approx(float(noise / power), rel=1e-5)


def test_more_bits_less_error(folder, tmp_path):
    errors = []
    for bits in range(2, 9):
        overrides = [f"weights.num_bits={bits}", f"modulation.num_bits={bits}"]
        report = quantize(folder, recipe="rtn-w4a16", overrides=overrides, out=tmp_path / str(bits))
        errors.append(report.blocks[1].weight_relative_error)
    assert errors == sorted(errors, reverse=True)
    assert all(coarse > 3 * fine for coarse, fine in zip(errors, errors[1:], strict=False))


def test_one_log_line_and_one_event_a_block(folder, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="s2q"):
        report = quantize(folder, recipe="rtn-w4a6", out=tmp_path / "out")
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("block ")]
    assert len(lines) == 3
    assert lines[0].startswith("block 1/3: 8 linears, weight error ")
    events = [json.loads(line) for line in (tmp_path / "out/s2q/events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["run", "block", "block", "block", "assemble"]
    for event, block in zip(events[1:4], report.blocks, strict=True):
        assert event["weight_relative_error"] == block.weight_relative_error
        assert event["peak_memory_bytes"] > 0
        assert event["seconds"] >= 0


def test_two_runs_are_bit_identical(folder, tmp_path, reference):
    quantize(folder, recipe="rtn-w4a6", out=tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == reference


def test_blocks_do_not_depend_on_each_other(folder, tmp_path, reference):
    """Block 1 alone, the others skipped, has the codes that it has in the whole run."""
    overrides = ["skip=['transformer_blocks.0.*', 'transformer_blocks.2.*']"]
    quantize(folder, recipe="rtn-w4a6", overrides=overrides, out=tmp_path / "alone")
    quantize(folder, recipe="rtn-w4a6", out=tmp_path / "all")
    alone, whole = (load_file(tmp_path / name / WEIGHTS) for name in ("alone", "all"))
    for name, tensor in whole.items():
        if name.startswith("transformer_blocks.1."):
            assert torch.equal(alone[name], tensor)


def test_runs_never_touch_the_siblings_of_their_output(folder, tmp_path):
    siblings = (".out.old-2024.s2q-run", ".out.old-thesis", ".out.partial-notes", ".out.partial-0123456789abcdef")
    for name in siblings:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    for overwrite in (False, True):
        quantize(folder, recipe="rtn-w4a6", out=tmp_path / "out", overwrite=overwrite)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*siblings, "out"])
    assert all((tmp_path / name / "mine").read_text() == "mine" for name in siblings)


def test_an_output_that_another_command_stages_is_busy(folder, tmp_path):
    with staged_directory(tmp_path / "out", overwrite=False) as staged:  # a demo
        (staged / "video.mp4").write_text("x")
        with pytest.raises(BusyError, match="being written by another run"):
            quantize(folder, recipe="rtn-w4a6", out=tmp_path / "out")
        assert (staged / "video.mp4").read_text() == "x"


@pytest.mark.parametrize("file", ["notes.txt", "transformer/lora.safetensors", "s2q/mine.json", ".git/config"])
def test_overwriting_a_checkpoint_never_deletes_files_of_the_user(folder, tmp_path, count_blocks, file):
    out = tmp_path / "out"
    quantize(folder, recipe="rtn-w4a6", out=out)
    (out / file).parent.mkdir(exist_ok=True)
    (out / file).write_text("mine")
    count_blocks["computed"] = []
    with pytest.raises(InvalidInputError, match=f"did not write.*: {re.escape(file)};"):
        quantize(folder, recipe="rtn-w4a6", out=out, overwrite=True)
    assert (out / file).read_text() == "mine"
    assert count_blocks["computed"] == []
    (out / file).unlink()
    quantize(folder, recipe="rtn-w4a6", out=out, overwrite=True)


def test_overwriting_a_checkpoint_never_deletes_an_edited_model_card(folder, tmp_path):
    out = tmp_path / "out"
    quantize(folder, recipe="rtn-w4a6", out=out)
    (out / "README.md").write_text("my words")
    with pytest.raises(InvalidInputError, match=r"edited since: README\.md;"):
        quantize(folder, recipe="rtn-w4a6", out=out, overwrite=True)
    assert (out / "README.md").read_text() == "my words"


def test_a_second_run_into_one_folder_is_refused(folder, tmp_path):
    out = tmp_path / "out"
    with open_run_folder(out), pytest.raises(BusyError, match="out is being written by another run"):
        quantize(folder, recipe="rtn-w4a6", out=out)
    assert not out.exists()
    quantize(folder, recipe="rtn-w4a6", out=out)
    assert out.is_dir()


def test_a_second_process_into_one_folder_is_refused(tmp_path):
    script = (
        "import sys; from pathlib import Path; from s2q.common.run_folder import open_run_folder\n"
        "with open_run_folder(Path(sys.argv[1])): print('locked', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"locked\n"
    with pytest.raises(BusyError), open_run_folder(tmp_path / "out"):
        pass
    process.kill()
    process.communicate()
    with open_run_folder(tmp_path / "out") as run:  # a killed process holds no lock
        run.clear()


def test_an_existing_output_is_kept_unless_overwritten(folder, tmp_path):
    out = tmp_path / "out"
    quantize(folder, recipe="rtn-w4a16", out=out)
    before = (out / WEIGHTS).read_bytes()
    with pytest.raises(InvalidInputError, match="exists; pass --overwrite"):
        quantize(folder, recipe="rtn-w8a8", out=out)
    assert (out / WEIGHTS).read_bytes() == before
    quantize(folder, recipe="rtn-w8a8", out=out, overwrite=True)
    assert (out / WEIGHTS).stat().st_size > len(before)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_never_replaces_what_s2q_did_not_write(folder, tmp_path):
    import shutil

    copy = shutil.copytree(folder, tmp_path / "copy")
    for model in (copy, folder):
        with pytest.raises(InvalidInputError, match="was not written by this command"):
            quantize(model, recipe="rtn-w4a6", out=copy, overwrite=True)
    assert (copy / "model_index.json").is_file()


def test_output_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInputError, match="file/out cannot be written"):
        quantize(folder, recipe="rtn-w4a6", out=tmp_path / "file/out")


def test_bad_input_leaves_nothing_behind(folder, tmp_path):
    bad = [
        ({"recipe": "rtn-w4a7"}, InvalidInputError, "rtn has the widths"),
        (
            {"recipe": "rtn-w4a6", "overrides": ["weights.num_bits=9"]},
            InvalidInputError,
            "num_bits=9; expected at least 2",
        ),
        ({"recipe": "rtn-w4a6", "overrides": ["skip=['*']"]}, InvalidInputError, "is left to quantize"),
        ({"recipe": "rtn-w4a6", "device": "tpu9"}, InvalidInputError, "device='tpu9'"),
        ({"recipe": "rtn-w4a6", "device": "mps"}, InvalidInputError, "device='mps' is an Apple GPU"),
        ({"recipe": "rtn-w4a6", "dtype": "float8"}, InvalidInputError, "unknown dtype 'float8'"),
        ({"recipe": "rtn-w4a6", "dtypo": "float32"}, TypeError, "unexpected keyword argument 'dtypo'"),
    ]
    for arguments, error, message in bad:
        with pytest.raises(error, match=message):
            quantize(folder, out=tmp_path / "out", **arguments)
        assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="no output given"):
        quantize(folder, recipe="rtn-w4a6")


def test_cuda_that_is_not_there(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ResourceError, match="device='cuda': .*, or use cpu"):
        quantize(folder, recipe="rtn-w4a6", out=tmp_path / "out", device="cuda")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["transformer_blocks.1.attn1.to_k.weight", "proj_out.bias"])
def test_weights_that_are_not_finite_name_the_tensor(tmp_path, name, value):
    pipe = tiny_pipeline("cogvideox")
    with torch.no_grad():
        pipe.transformer.get_parameter(name).view(-1)[3] = value
    with pytest.raises(InvalidInputError, match=rf"{name} contains 1 NaN or infinite values"):
        quantize(pipe, recipe="rtn-w4a6", out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


HUGE = [
    ("transformer_blocks.1.attn1.to_q.weight", 3e38, "float32"),
    ("transformer_blocks.0.attn1.to_out.0.weight", -3e38, "bfloat16"),
    ("transformer_blocks.0.ff.net.2.weight", 1e20, "float32"),
    ("transformer_blocks.2.ff.net.0.proj.bias", 3e38, "float32"),
    ("transformer_blocks.0.norm1.linear.weight", -1e25, "float32"),
    ("transformer_blocks.1.norm1.norm.weight", 1e30, "bfloat16"),
    ("patch_embed.proj.weight", 3e38, "float32"),
    ("time_embedding.linear_1.weight", 2e19, "float32"),
    ("norm_out.linear.bias", -3e38, "bfloat16"),
    ("proj_out.weight", 3e38, "float32"),
]


@pytest.mark.parametrize(("name", "value", "dtype"), HUGE)
@pytest.mark.parametrize("recipe", ["rtn-w4a6", "s2q-w4a6"])
def test_weights_that_overflow_name_the_tensor(tmp_path, name, value, dtype, recipe):
    pipe = tiny_pipeline("cogvideox", num_layers=3, dtype=getattr(torch, dtype))
    with torch.no_grad():
        pipe.transformer.get_parameter(name).view(-1)[3] = value
    with pytest.raises(
        InvalidInputError, match=rf"{re.escape(name)} contains a value of magnitude .* overflows float32"
    ):
        quantize(pipe, recipe=recipe, out=tmp_path / "out", prompts=["a"])
    assert not list(tmp_path.iterdir())


def test_large_weights_that_do_not_overflow_are_quantized(tmp_path):
    pipe = tiny_pipeline("cogvideox", num_layers=3)
    with torch.no_grad():
        pipe.transformer.get_parameter("transformer_blocks.1.attn1.to_v.weight").view(-1)[3] = 1e6
    assert quantize(pipe, recipe="rtn-w4a6", out=tmp_path / "out").storage["ratio"] > 1


def test_a_quantized_model_is_refused(folder, tmp_path):
    from s2q.checkpoint import load_pipeline

    quantize(folder, recipe="rtn-w4a6", out=tmp_path / "once")
    for model in (tmp_path / "once", load_pipeline(tmp_path / "once")):
        with pytest.raises(InvalidInputError, match="its transformer is already quantized"):
            quantize(model, recipe="rtn-w4a6", out=tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize(
    ("component", "linear", "offloaded"),
    [("transformer", "to_q", "patch_embed.proj.weight"), ("text_encoder", "q", "its text_encoder")],
)
def test_adapters_and_offloaded_weights_are_refused(component, linear, offloaded, tmp_path):
    from accelerate import cpu_offload
    from peft import LoraConfig

    options = {"recipe": "rtn-w4a6", "overrides": ["text_encoder.num_bits=8"], "out": tmp_path / "out"}
    pipe = tiny_pipeline("cogvideox")
    getattr(pipe, component).add_adapter(LoraConfig(r=2, target_modules=[linear]))
    with pytest.raises(InvalidInputError, match=f"its {component} has an adapter"):
        quantize(pipe, **options)
    pipe = tiny_pipeline("cogvideox")
    cpu_offload(getattr(pipe, component), torch.device("cpu"))
    with pytest.raises(InvalidInputError, match=f"{offloaded} is offloaded; load the pipeline without offloading"):
        quantize(pipe, **options)
    assert not (tmp_path / "out").exists()


def test_dtype_of_a_loaded_pipeline_must_be_the_one_asked_for(tmp_path):
    with pytest.raises(InvalidInputError, match=r"loaded in torch\.float32, dtype=torch\.bfloat16 asked for"):
        quantize(tiny_pipeline("cogvideox"), recipe="rtn-w4a6", out=tmp_path / "out", dtype="bfloat16")


def test_a_pipeline_without_transformer(tmp_path):
    with pytest.raises(InvalidInputError, match="has no transformer"):
        quantize(types.SimpleNamespace(transformer=None), recipe="rtn-w4a6", out=tmp_path / "out")


def test_a_loaded_pipeline_gives_what_its_folder_gives(folder, tmp_path, reference):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    report = quantize(pipe, recipe="rtn-w4a6", out=tmp_path / "out")
    assert report.source == "tiny"
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == reference


def test_dry_run_returns_the_plan_and_touches_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Machine, "process_bytes", 10**9)  # this process grows from plan to plan
    planned = quantize(folder, recipe="rtn-w4a6", out=tmp_path / "out", dry_run=True)
    assert isinstance(planned, Plan)
    assert planned == plan(folder, recipe="rtn-w4a6")
    loaded = quantize(tiny_pipeline("cogvideox", num_layers=3, dtype=torch.bfloat16), recipe="rtn-w4a6", dry_run=True)
    assert (loaded.layers, loaded.storage) == (planned.layers, planned.storage)
    assert not list(tmp_path.iterdir())


def test_weights_of_a_loaded_pipeline_are_planned_once(folder, monkeypatch):
    monkeypatch.setattr(Machine, "process_bytes", 10**9)
    pipe = tiny_pipeline("cogvideox", num_layers=3, dtype=torch.bfloat16)
    from_folder, loaded = (quantize(one, recipe="rtn-w4a6", dry_run=True) for one in (folder, pipe))
    weights = sum(tensor.nbytes for tensor in pipe.transformer.state_dict().values())
    assert from_folder.stages[0].peak_memory_bytes - loaded.stages[0].peak_memory_bytes == weights


def test_dry_run_refuses_what_the_run_would_refuse(folder, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(InvalidInputError, match="exists; pass --overwrite"):
        quantize(folder, recipe="rtn-w4a6", out=tmp_path / "out", dry_run=True)
    with pytest.raises(InvalidInputError, match="device='tpu9'"):
        quantize(folder, recipe="rtn-w4a6", device="tpu9", dry_run=True)


def test_a_loaded_variant_of_an_embedded_model_keeps_its_name():
    """The variants share a folder, which is therefore not what they are called after."""
    pipe = tiny_pipeline("cogvideox")
    pipe.register_to_config(_name_or_path="shapes-cogvideox-outliers")
    assert quantize(pipe, recipe="rtn-w4a6", dry_run=True).model == "shapes-cogvideox-outliers"


def test_a_sharded_checkpoint_has_the_reported_bytes(folder, tmp_path):
    from s2q.checkpoint import inspect_checkpoint, load_pipeline

    report = quantize(folder, recipe="rtn-w4a6", out=tmp_path / "out", max_shard_size="32KB")
    assert len(list((tmp_path / "out/transformer").glob("*.safetensors"))) > 2
    assert (
        inspect_checkpoint(tmp_path / "out", verify=True).storage["quantized_bytes"]
        == report.storage["quantized_bytes"]
    )
    load_pipeline(tmp_path / "out")


@pytest.mark.parametrize("kind", ["ours", "theirs"])
def test_a_full_disk_is_one_error_and_the_run_resumes(folder, tmp_path, monkeypatch, kind):
    import errno

    from diffusers import DiffusionPipeline
    from safetensors import SafetensorError

    errors = {
        "ours": OSError(errno.ENOSPC, "No space left on device"),
        "theirs": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    }

    def full(self, *args, **kwargs):
        raise errors[kind]

    with monkeypatch.context() as patch:
        patch.setattr(DiffusionPipeline, "save_pretrained", full)
        with pytest.raises(ResourceError, match="out: the disk is full"):
            quantize(folder, recipe="rtn-w4a6", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert all(block.resumed for block in quantize(folder, recipe="rtn-w4a6", out=tmp_path / "out").blocks)


def test_lack_of_memory_is_one_line_with_a_remedy(folder, tmp_path, monkeypatch):
    def exhausted(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nmore")

    monkeypatch.setattr(runner, "quantize_block", exhausted)
    with pytest.raises(ResourceError, match="out of memory while quantizing on cpu") as caught:
        quantize(folder, recipe="rtn-w4a6", out=tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_zero_weight_survives(tmp_path):
    from s2q.checkpoint import load_pipeline

    pipe = tiny_pipeline("cogvideox")
    with torch.no_grad():
        pipe.transformer.transformer_blocks[0].attn1.to_q.weight.zero_()
    report = quantize(pipe, recipe="rtn-w4a6", out=tmp_path / "out")
    assert report.blocks[0].layers["transformer_blocks.0.attn1.to_q"] == 0
    layer = load_pipeline(tmp_path / "out").transformer.transformer_blocks[0].attn1.to_q
    assert not layer.dequantized_weight(torch.float32).any()
