"""SDNQ's format: configuration and tensors, and its own code on an export, in a process that cannot import s2q."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import s2q
from exported import BRANCH, CONVROT, GROUPS, OUTER, ROW, linear_of, packed_linears
from s2q.core.input_path import InputPath
from s2q.exports.targets import TARGETS
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
H4 = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
USUAL = {
    "weights_dtype": "int4",
    "group_size": -1,
    "use_quantized_matmul": True,
    "use_hadamard": True,
    "hadamard_group_size": 64,
    "use_svd": False,
    "svd_rank": 32,
}
WIDE = USUAL | {"hadamard_group_size": 256}
MODULATION = WIDE | {"use_quantized_matmul": False, "use_hadamard": False}
CONFIG = {
    **USUAL,
    "quant_method": "sdnq",
    "sdnq_version": "0.2.8",
    "is_integer": True,
    "is_unsigned": False,
    "dequantize_fp32": True,
    "quantized_matmul_dtype": "int8",
    "add_skip_keys": False,
    "minimum_allowed_numel": 0,
    "minimum_allowed_channel_size": 0,
    "modules_to_not_convert": [
        ".patch_embed.text_proj.",
        ".time_embedding.linear_1.",
        ".time_embedding.linear_2.",
        ".norm_out.linear.",
        ".proj_out.",
    ],
    "modules_dtype_dict": {},
    "modules_quant_config": {
        ".transformer_blocks.0.norm1.linear.": MODULATION,
        ".transformer_blocks.0.ff.net.2.": WIDE,
        ".transformer_blocks.0.norm2.linear.": MODULATION,
        ".transformer_blocks.1.norm1.linear.": MODULATION,
        ".transformer_blocks.1.ff.net.2.": WIDE,
        ".transformer_blocks.1.norm2.linear.": MODULATION,
    },
}


def test_the_configuration_of_a_model(made, tmp_path):
    checkpoint = made("cogvideox", CONVROT)
    s2q.export(checkpoint, to="sdnq", out=tmp_path / "out")
    config = json.loads((tmp_path / "out/transformer/config.json").read_text())["quantization_config"]
    assert config == CONFIG
    transformer, linears = packed_linears(checkpoint)
    modules = transformer.named_modules()
    unquantized = [name for name, part in modules if isinstance(part, nn.Linear) and name not in linears]
    assert config["modules_to_not_convert"] == [f".{name}." for name in unquantized]


def test_a_branch_is_rotated_and_transposed(made, tmp_path):
    checkpoint = made("cogvideox", CONVROT, *BRANCH, *OUTER)
    s2q.export(checkpoint, to="sdnq", out=tmp_path / "out")
    config = json.loads((tmp_path / "out/transformer/config.json").read_text())["quantization_config"]
    tensors = load_file(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors")
    name = "transformer_blocks.0.attn1.to_q"
    layer = packed_linears(checkpoint)[1][name]
    assert (config["use_svd"], config["svd_rank"]) == (True, layer.path.low_rank)
    up, down = layer.low_rank_weight.float(), layer.low_rank_basis.float().t()
    rotated = down @ torch.kron(torch.kron(H4, H4), H4)
    assert tensors[f"{name}.svd_up"].shape == (layer.path.low_rank, 64)
    assert torch.equal(tensors[f"{name}.svd_up"], up.t())
    torch.testing.assert_close(tensors[f"{name}.svd_down"], rotated.t(), rtol=0, atol=1e-6)
    assert f"{name.replace('attn1.to_q', 'norm1.linear')}.svd_up" not in tensors


@pytest.mark.parametrize("activation", [None, 8])
def test_a_branch_beside_unquantized_inputs_is_not_transposed(activation):
    generator = torch.Generator().manual_seed(0)
    basis, up = (torch.randint(-4, 5, (size, 2), generator=generator).bfloat16() for size in (len(ROW), 3))
    layer, form = linear_of(
        [ROW] * 3,
        [0.5, 1.0, 2.0],
        activation=activation,
        inputs={"low_rank_basis": basis, "low_rank_weight": up},
        path=InputPath(low_rank=2, deflates=False),
    )
    tensors = TARGETS["sdnq"].encode(layer, form)
    expected = {"svd_up": up.float(), "svd_down": basis.float().t()}
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor if activation is None else tensor.t())
    assert tensors["weight"].tolist() == [0xF0, 0x78, 0x69, 0x5A, 0x4B, 0x3C, 0x2D, 0x1E] * 3
    assert tensors["scale"].tolist() == [[0.5], [1.0], [2.0]]
    weight = TARGETS["sdnq"].decode(tensors, form)
    torch.testing.assert_close(weight, layer.effective_weight(torch.float32), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_have_a_dimension_of_scales_and_that_of_int8_codes(bits):
    layer, form = linear_of([ROW, ROW[::-1]], [[0.5, 1.0], [2.0, 4.0]], bits=bits, group_size=8)
    tensors = TARGETS["sdnq"].encode(layer, form)
    assert tensors["scale"].tolist() == [[[0.5], [1.0]], [[2.0], [4.0]]]
    if bits == 8:
        assert tensors["weight"].tolist() == [[ROW[:8], ROW[8:]], [ROW[:7:-1], ROW[7::-1]]]
    assert torch.equal(TARGETS["sdnq"].decode(tensors, form), layer.effective_weight(torch.float32))


@pytest.mark.parametrize("activation", [None, 8])
def test_int8_codes_are_transposed_beside_quantized_inputs(activation):
    layer, form = linear_of([[-127, 127, 0], [1, 2, 3]], [0.5, 1.0], bits=8, activation=activation)
    tensors = TARGETS["sdnq"].encode(layer, form)
    codes, scale = tensors["weight"], tensors["scale"]
    if activation is not None:
        codes, scale = codes.t(), scale.t()
    assert (codes.tolist(), scale.tolist()) == ([[-127, 127, 0], [1, 2, 3]], [[0.5], [1.0]])
    assert torch.equal(TARGETS["sdnq"].decode(tensors, form), layer.effective_weight(torch.float32))


def test_groups_of_int8_are_exported(made, tmp_path):
    groups = (GROUPS[0].replace("num_bits: 4", "num_bits: 8"), GROUPS[1])
    checkpoint = made("cogvideox", "rtn-w4a16", *groups)
    report = s2q.export(checkpoint, to="sdnq", out=tmp_path / "out")
    assert report.largest_difference == 0
    config = json.loads((tmp_path / "out/transformer/config.json").read_text())["quantization_config"]
    expected = {"weights_dtype": "int8", "group_size": 32, "use_quantized_matmul": False, "use_hadamard": False}
    assert {name: config[name] for name in expected} == expected
    tensors = load_file(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors")
    name = "transformer_blocks.0.attn1.to_q"
    assert tensors[f"{name}.weight"].shape == (64, 2, 32)
    assert torch.equal(tensors[f"{name}.weight"].flatten(1), packed_linears(checkpoint)[1][name].codes())


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
