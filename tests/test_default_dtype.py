"""The default compute dtype of models: the stored one, or float32 where the CPU emulates that."""

import hashlib
import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from quick import slow
from s2q.common import devices
from s2q.common.log import log_once
from s2q.common.processor import is_x86
from s2q.comparison.compare import compare
from s2q.evaluation.evaluate import evaluate
from s2q.generation.generate import generate
from s2q.generation.load import load_pipeline
from s2q.planning import plan
from s2q.run.quantize import quantize
from tiny import tiny_pipeline

PROMPTS = ["a red circle", "a blue square"]
SMALL = [
    *("calibration.steps=2", "calibration.samples=2", "distillation.epochs=1"),
    *("calibration.num_frames=9", "calibration.height=16", "calibration.width=16"),
]
SETTINGS = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 16, "width": 16, "num_frames": 9}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model of each dtype, and a checkpoint of the bf16 one made where bf16 has arithmetic."""
    root = tmp_path_factory.mktemp("models")
    for name in ("bfloat16", "float16", "float32"):
        tiny_pipeline("cogvideox", dtype=getattr(torch, name)).save_pretrained(root / name)
    tiny_pipeline("wan", dtype=torch.bfloat16).save_pretrained(root / "wan")
    quantize(root / "bfloat16", recipe="rtn-w4a6", out=root / "quantized")
    return root


def test_a_gpu_emulates_nothing(emulated_half):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert devices.default_dtype(dtype, "cuda:1") == dtype
        assert devices.default_dtype(dtype, "cpu") == torch.float32


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "quantized"])
def test_load_computes_in_float32_unless_told(folders, emulated_half, name):
    pipe = load_pipeline(folders / name)
    assert pipe.transformer.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.float32
    assert load_pipeline(folders / name, dtype="bfloat16").transformer.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_load_computes_in_the_stored_dtype_where_it_has_arithmetic(folders, name):
    assert load_pipeline(folders / name).transformer.dtype == getattr(torch, name)


def test_it_is_logged_once(folders, emulated_half, caplog):
    log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="s2q"):
        for name in ("bfloat16", "quantized", "float32"):
            load_pipeline(folders / name)
        load_pipeline(folders / "bfloat16", dtype="bfloat16")
    lines = [record.message for record in caplog.records if "float32" in record.message]
    assert lines == ["computing in float32: this CPU has no bfloat16 arithmetic; --dtype bfloat16 (dtype=) emulates it"]


def test_generate_takes_the_same_dtype(folders, emulated_half):
    by_name = generate(folders / "bfloat16", prompts=PROMPTS[:1], **SETTINGS)
    loaded = generate(load_pipeline(folders / "bfloat16", dtype="float32"), prompts=PROMPTS[:1], **SETTINGS)
    assert torch.equal(by_name[0].latents, loaded[0].latents)


@pytest.mark.parametrize(("asked", "used"), [(None, "float32"), slow("bfloat16", "bfloat16")])
def test_eval_names_the_one_dtype_of_both_sides(folders, emulated_half, asked, used):
    sides = {"model": folders / "quantized", "reference": folders / "bfloat16"}
    result = evaluate(**sides, prompts=PROMPTS, seeds=[0], metrics=("psnr", "velocity"), dtype=asked, **SETTINGS)
    assert result["settings"]["dtype"] == used


def test_compare_names_the_dtype_and_is_not_resumed_in_another(folders, emulated_half, monkeypatch, tmp_path):
    from s2q.common.errors import InvalidInputError

    def run():
        return compare(
            ["rtn-w4a6"],
            model=folders / "bfloat16",
            out=tmp_path / "out",
            prompts=PROMPTS,
            seeds=[0],
            metrics=("psnr",),
            **SETTINGS,
        )

    assert run()["settings"]["dtype"] == "float32"
    monkeypatch.setattr(devices, "has_arithmetic", lambda dtype: True)
    with pytest.raises(InvalidInputError, match="emulated"):
        run()


def stored_tensors(out):
    return load_file(out / WEIGHTS)


def test_a_recipe_that_only_rounds_gives_the_same_bytes_on_every_cpu(folders, emulated_half, tmp_path):
    quantize(folders / "bfloat16", recipe="rtn-w4a6", out=tmp_path / "out")
    for name in (WEIGHTS, "transformer/config.json", "vae/diffusion_pytorch_model.safetensors"):
        here, there = ((root / name).read_bytes() for root in (tmp_path / "out", folders / "quantized"))
        assert hashlib.sha256(here).digest() == hashlib.sha256(there).digest(), name


@pytest.mark.parametrize(
    ("model", "recipe"), [("bfloat16", "s2q-w4a6"), slow("bfloat16", "s2q-plus-w4a4"), slow("wan", "s2q-w4a6")]
)
def test_a_calibrated_checkpoint_is_stored_in_the_stored_dtype_and_calibrated_in_float32(
    folders, emulated_half, monkeypatch, tmp_path, recipe, model
):
    overrides = [*SMALL, "refinement.epochs=1"] if "plus" in recipe else SMALL
    arguments = {"recipe": recipe, "prompts": PROMPTS, "overrides": overrides}
    wide = quantize(folders / model, out=tmp_path / "wide", **arguments)
    assert wide.dtype == "float32"
    monkeypatch.setattr(devices, "has_arithmetic", lambda dtype: True)
    same = quantize(folders / model, out=tmp_path / "same", **arguments)
    assert same.dtype == "bfloat16"
    assert wide.storage == same.storage
    tensors, others = (stored_tensors(tmp_path / name) for name in ("wide", "same"))
    source = stored_tensors(folders / model)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert (tensor.dtype, tensor.shape) == (others[name].dtype, others[name].shape), name
        if name in source and tensor.dtype.is_floating_point and not name.endswith("bias"):
            assert torch.equal(tensor, source[name]), name  # not quantized, so not changed
    for name in ("transformer/config.json", "model_index.json", "text_encoder/model.safetensors"):
        assert (tmp_path / "wide" / name).read_bytes() == (tmp_path / "same" / name).read_bytes(), name
    assert load_pipeline(tmp_path / "wide").transformer.dtype == torch.bfloat16


def test_an_explicit_dtype_is_what_a_model_is_calibrated_and_stored_in(folders, emulated_half, tmp_path):
    arguments = {"recipe": "s2q-w4a6", "prompts": PROMPTS, "overrides": SMALL, "dtype": "bfloat16"}
    report = quantize(folders / "bfloat16", out=tmp_path / "out", **arguments)
    assert report.dtype == "bfloat16"
    config = json.loads((tmp_path / "out/transformer/config.json").read_text())
    assert config["quantization_config"]["compute_dtype"] == "bfloat16"


def test_the_plan_counts_what_is_computed_in_and_stores_what_was_stored(folders, monkeypatch, emulated_half):
    wide = plan(folders / "bfloat16", recipe="s2q-w4a6")
    rounding = plan(folders / "bfloat16", recipe="rtn-w4a6")
    monkeypatch.setattr(devices, "has_arithmetic", lambda dtype: True)
    same = plan(folders / "bfloat16", recipe="s2q-w4a6")
    assert wide.storage == same.storage
    assert wide.layers == same.layers
    assert wide.calibration.host_bytes > same.calibration.host_bytes
    assert rounding.storage == plan(folders / "bfloat16", recipe="rtn-w4a6").storage


@pytest.mark.slow
@pytest.mark.skipif(not is_x86(), reason="only x86 CPUs can be capped")
def test_a_cpu_without_bf16_is_recognised(folders):
    code = f"import s2q; print(s2q.load({str(folders / 'bfloat16')!r}).transformer.dtype)"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "torch.float32"
