"""Lack of memory is exit code 4 and one line in every verb, whichever library notices it and however it says so."""

import errno
import os

import diffusers
import pytest
import torch
from safetensors import SafetensorError

import s2q
from quick import quick
from s2q.cli import run
from s2q.common.errors import ResourceError

KINDS = {
    "MemoryError": MemoryError(),
    "torch.OutOfMemoryError": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "the CPU's allocator": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 4 GB"),
    "mmap": RuntimeError("unable to mmap 1024 bytes from file <x>: Cannot allocate memory (12)"),
    "ENOMEM": OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    "safetensors": SafetensorError("Cannot allocate memory (os error 12)"),
}
QUICK_KINDS = quick(KINDS, "MemoryError", "ENOMEM")
SETTINGS = {"num_frames": 9, "height": 16, "width": 16, "num_inference_steps": 2}


def raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize("kind", QUICK_KINDS)
@pytest.mark.parametrize("place", ["load", "transformer", "decode"])
def test_lack_of_memory_in_generate(tiny_model, tmp_path, monkeypatch, capsys, kind, place):
    if place == "load":
        monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", raising(KINDS[kind]))
    elif place == "transformer":
        monkeypatch.setattr(diffusers.CogVideoXTransformer3DModel, "forward", raising(KINDS[kind]))
    else:
        monkeypatch.setattr(diffusers.AutoencoderKLCogVideoX, "decode", raising(KINDS[kind]))
    with pytest.raises(ResourceError, match="out of memory while (it was loaded|generating videos); use .*bfloat16"):
        s2q.generate(str(tiny_model), prompts=["a"], **SETTINGS)
    out = tmp_path / "out"
    code = run(["generate", "-m", str(tiny_model), "--prompt", "a", "-o", str(out), "--steps", "2", "--device", "cpu"])
    assert code == 4
    captured = capsys.readouterr().err
    assert [line for line in captured.splitlines() if line.startswith("error: ")] == [captured.splitlines()[-1]]
    assert not any(word in captured for word in ("defect", "again", "Traceback"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", QUICK_KINDS)
def test_lack_of_memory_while_a_checkpoint_is_loaded(tiny_model, tmp_path, monkeypatch, kind):
    s2q.quantize(tiny_model, recipe="rtn-w4a6", out=tmp_path / "out")
    monkeypatch.setattr(diffusers.CogVideoXTransformer3DModel, "from_pretrained", raising(KINDS[kind]))
    with pytest.raises(ResourceError, match="out of memory while it was loaded; use .*bfloat16"):
        s2q.load(tmp_path / "out")


VERBS = {
    "quantize": lambda model, out: s2q.quantize(model, recipe="rtn-w4a6", out=out),
    "evaluate": lambda model, out: s2q.evaluate(model, reference=model, prompts=["a"], seeds=[0], **SETTINGS),
    "load": lambda model, out: s2q.load(model),
}


@pytest.mark.parametrize("kind", QUICK_KINDS)
@pytest.mark.parametrize("verb", VERBS)
def test_lack_of_memory_at_load_in_every_verb(tiny_model, tmp_path, monkeypatch, verb, kind):
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", raising(KINDS[kind]))
    with pytest.raises(ResourceError, match="out of memory") as caught:
        VERBS[verb](str(tiny_model), tmp_path / "out")
    assert not any(word in str(caught.value) for word in ("defect", "download"))
