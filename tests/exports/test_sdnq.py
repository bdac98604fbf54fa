"""SDNQ's own code on an export, in a process that cannot import s2q."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import s2q
from s2q.models.source import resolve_model
from tiny import transformer_inputs

CODE = """
import json, sys
from pathlib import Path

class Blocked:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "s2q":
            raise ImportError("s2q is not to be imported")

sys.meta_path.insert(0, Blocked())
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file

folder, recorded, out = sys.argv[1:]
model = CogVideoXTransformer3DModel.from_pretrained(folder, subfolder="transformer", dtype=torch.float32)
inputs, outputs, quantized = load_file(recorded), {}, {}
for name, module in model.named_modules():
    if f"{name}:in" in inputs:
        outputs[name] = module(inputs[f"{name}:in"])
        quantized[name] = module.sdnq_dequantizer.use_quantized_matmul
save_file(outputs, out)
print(json.dumps(quantized))
"""
BRANCH = ("transforms.low_rank=8", "transforms.low_rank_from=weight")


@pytest.mark.skipif(importlib.util.find_spec("sdnq") is None, reason="sdnq is not installed")
@pytest.mark.parametrize("recipe", [("convrot-w4a8",), ("convrot-w4a8", *BRANCH), ("convrot-w8a8",)], ids="".join)
def test_every_linear_computes_the_same_in_a_process_without_s2q(made, recipe, tmp_path):
    checkpoint = made("cogvideox", *recipe)
    s2q.export(checkpoint, to="sdnq", out=tmp_path / "out")
    pipe = s2q.load(checkpoint, dtype="float32")
    recorded, expected = {}, {}

    def record(name):
        def hook(_module, arguments, output):
            recorded[f"{name}:in"], expected[name] = arguments[0].clone(), output.clone()

        return hook

    for name in resolve_model(checkpoint).quantization["layers"]:
        pipe.transformer.get_submodule(name).register_forward_hook(record(name))
    with torch.no_grad():
        pipe.transformer(**text_of(pipe, transformer_inputs(batch=2)), return_dict=False)
    save_file(recorded, tmp_path / "recorded.safetensors")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, tmp_path / "out", tmp_path / "recorded.safetensors", tmp_path / "outputs"],
        env=environment | {"SDNQ_USE_TORCH_COMPILE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    quantized = json.loads(done.stdout.splitlines()[-1])
    outputs = load_file(tmp_path / "outputs")
    assert outputs.keys() == expected.keys() == quantized.keys()
    assert {name for name, product in quantized.items() if product} == {
        name for name in expected if pipe.transformer.get_submodule(name).scheme.activation is not None
    }
    for name, output in expected.items():
        difference = float((outputs[name] - output).abs().max() / output.abs().max())
        assert difference < 5e-6, f"{name}: {difference:.1e}"


def text_of(pipe, inputs):
    """The inputs with as many text tokens as the transformer takes: enough rows for every linear."""
    length = pipe.transformer.config.max_text_seq_length
    text = torch.randn(2, length, 32, generator=torch.Generator().manual_seed(1))
    return {**inputs, "encoder_hidden_states": text}
