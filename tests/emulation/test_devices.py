"""Devices that are not there, cards that kernels do not serve, and models that overflow: one line and the way out."""

import pytest
import torch

import s2q
from emulation import emulator, runs
from s2q.blocks import distil
from s2q.cli import run
from s2q.common.errors import ResourceError
from s2q.common.log import log_once
from s2q.ops import dispatch

pytestmark = pytest.mark.gpu

COMMANDS = {
    "plan": ["plan", "-r", "rtn-w4a6", "--measure"],
    "quantize": ["quantize", "-r", "rtn-w4a6", "-o", "out"],
    "generate": ["generate", "--prompt", "red", "-o", "out"],
    "eval": ["eval", "-o", "out.json", "--reference", "MODEL"],
    "compare": ["compare", "rtn-w4a6", "-o", "out"],
    "bench": ["bench", "-o", "out.json"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_gpu_that_is_not_there_is_told_with_those_that_are(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = str(runs.model_folder("cogvideox"))
    capsys.readouterr()
    arguments = [model if one == "MODEL" else one for one in COMMANDS[command]]
    assert run([*arguments, "-m", model, "--device", "cuda:9"]) == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert "'cuda:9': this machine has cuda:0" in captured.err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def compiled(monkeypatch):
    """Choose backends as where kernels are compiled, and for the first time."""
    monkeypatch.setattr(dispatch, "is_interpreting", lambda: False)
    log_once.cache_clear()


@pytest.mark.parametrize(
    ("obstacle", "told"),
    [
        ("an old GPU", "compute capability 7.5; expected 8.0 or newer"),
        ("an AMD GPU", "got a tensor on a ROCm device; expected an NVIDIA GPU"),
        ("no triton", "triton is not installed"),
    ],
)
def test_what_kernels_do_not_serve_takes_the_torch_path_with_one_line(
    obstacle, told, compiled, device, monkeypatch, caplog
):
    if obstacle == "an old GPU":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    elif obstacle == "an AMD GPU":
        monkeypatch.setattr(torch.version, "hip", "7.0")
    else:
        monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    caplog.set_level("WARNING", logger="s2q")
    runs.check_against_cpu("cogvideox", "s2q-w4a6", device)
    said = [record.message for record in caplog.records if "backend" in record.message]
    assert len(said) == 1
    assert told in said[0]


def test_float16_that_overflows_is_told_with_the_way_out(device, tmp_path, capsys):
    pipe = runs.load(runs.model_folder("cogvideox"), "cpu")
    with torch.no_grad():
        pipe.transformer.proj_out.weight.mul_(1e5)
    pipe.save_pretrained(tmp_path / "model")
    del pipe
    model = ["-m", str(tmp_path / "model"), "--dtype", "float16", "--device", device]
    capsys.readouterr()
    size = ["--height", "16", "--width", "16", "--num-frames", "9", "--steps", "2"]
    assert run(["generate", *model, "--prompt", "red", "-o", str(tmp_path / "out"), *size]) == 1
    assert "float16 overflows above 65,504; use --dtype bfloat16" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.emulated
def test_two_gpus_are_emulated():
    assert torch.cuda.device_count() == emulator.DEVICES


@pytest.mark.parametrize("failures", [1, 2])
def test_a_block_without_device_memory_is_tried_once_more_and_leaves_nothing(
    failures, device, tmp_path, monkeypatch, caplog
):
    step, calls = distil.Optimization.step, []

    def failing(optimization, sample):
        calls.append(sample)
        if len(calls) <= failures:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return step(optimization, sample)

    monkeypatch.setattr(distil.Optimization, "step", failing)
    model, overrides = runs.model_folder("cogvideox"), runs.quick("s2q-w4a6")
    arguments = {"recipe": "s2q-w4a6", "prompts": ["red"], "overrides": overrides, "device": device}
    if failures == 1:
        report = s2q.quantize(model, out=tmp_path / "out", **arguments)
        assert report.blocks[0].memory_retry["piece"] == 1024
    else:
        with pytest.raises(ResourceError, match=rf"transformer_blocks\.0 on {device} .*calibration\.num_frames"):
            s2q.quantize(model, out=tmp_path / "out", **arguments)
    calls.clear()
    assert f"transformer_blocks.0: out of memory on {device}" in caplog.text
