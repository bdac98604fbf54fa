"""What a target stores is what s2q computes; what it cannot store is refused before anything is written."""

import json
import typing
from dataclasses import replace

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file

import s2q
from exported import BRANCH, CONVROT, OUTER
from s2q.checkpoint import verify_manifest
from s2q.cli import export as command
from s2q.cli import run
from s2q.common.components import TRANSFORMERS
from s2q.common.errors import InvalidInputError, S2QError
from s2q.exports import export as module
from s2q.exports.targets import TARGETS


def test_biases_are_compared_within_what_the_dtype_rounds(made, tmp_path, monkeypatch):
    encode = TARGETS["diffusers"].encode

    def damaged(layer, form):
        return encode(layer, form) | {"bias": layer.bias * (1 + 1e-5)}

    monkeypatch.setattr(module, "TARGETS", {"diffusers": replace(TARGETS["diffusers"], encode=damaged)})
    with pytest.raises(
        S2QError, match=r"its bias differs by .*e-0[56] .*expected at most 6\.0e-08; nothing was exported"
    ):
        s2q.export(made("cogvideox", CONVROT), to="diffusers", out=tmp_path / "out")


@pytest.mark.parametrize("target", ["sdnq", "diffusers"])
def test_int8_attention_is_refused(made, tmp_path, target):
    checkpoint = made("cogvideox", CONVROT, "attention.num_bits=8")
    with pytest.raises(InvalidInputError, match=r"attn1: .* cannot store its int8 attention; .*attention=null"):
        s2q.export(checkpoint, to=target, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_has_every_target_and_component():
    assert set(typing.get_args(command.Target)) == set(TARGETS)
    assert typing.get_args(command.Component) == TRANSFORMERS


def test_a_dense_export_is_the_dequantized_model_without_s2q(made, tmp_path):
    checkpoint = made("cogvideox", CONVROT, *BRANCH, *OUTER)
    report = s2q.export(checkpoint, to="diffusers", out=tmp_path / "out")
    config = json.loads((tmp_path / "out/transformer/config.json").read_text())
    assert "quantization_config" not in config
    dense = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "out", subfolder="transformer")
    model = CogVideoXTransformer3DModel.from_pretrained(checkpoint, subfolder="transformer")
    model.dequantize()
    assert dense.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(dense.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert report.largest_difference == 0
    assert verify_manifest(tmp_path / "out") == []
    assert not (tmp_path / "out/s2q/recipe.json").exists()
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"vae", "text_encoder", "tokenizer", "scheduler"}
    assert "s2q export --to diffusers" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("overrides", [(), (*BRANCH, *OUTER)], ids=["plain", "branch"])
@pytest.mark.parametrize("recipe", [CONVROT, "convrot-w8a8"])
def test_sdnqs_tensors_give_the_same_weights(made, recipe, overrides, tmp_path):
    checkpoint = made("cogvideox", recipe, *overrides)
    report = s2q.export(checkpoint, to="sdnq", out=tmp_path / "out")
    assert report.largest_difference < 5e-6  # fp32 sums in another order
    config = json.loads((tmp_path / "out/transformer/config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["use_quantized_matmul"], config["use_hadamard"]) == ("sdnq", True, True)
    tensors = load_file(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors")
    model = CogVideoXTransformer3DModel.from_pretrained(checkpoint, subfolder="transformer")
    name = "transformer_blocks.0.attn1.to_q"
    layer = model.get_submodule(name)
    weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.scale"]
    if recipe == CONVROT:
        codes = torch.stack([weight & 15, weight >> 4], dim=1).reshape(layer.out_features, -1).char() - 8
    else:
        codes, scale = weight.t(), scale.t()
    assert torch.equal(codes, layer.codes())
    assert torch.equal(scale, layer.weight_scale.unsqueeze(1))
    assert (f"{name}.svd_down" in tensors) == bool(overrides)
    others = [key for key in config["modules_quant_config"] if key.endswith("norm1.linear.")]
    assert others
    assert not config["modules_quant_config"][others[0]]["use_quantized_matmul"]


def test_sdnq_bytes_are_codes_plus_8_the_first_in_the_low_nibble():
    """The example of the format: [-8, 7, 0, -1] is 0xf0, 0x78."""
    from s2q.core.packing import pack_codes

    assert pack_codes(torch.tensor([[-8, 7, 0, -1]], dtype=torch.int8), num_bits=4).tolist() == [[0xF0, 0x78]]


@pytest.mark.parametrize("target", ["diffusers", "sdnq"])
def test_an_export_that_differs_from_the_checkpoint_is_discarded(made, target, tmp_path, monkeypatch):
    encode = TARGETS[target].encode

    def damaged(layer, form):
        tensors = encode(layer, form)
        first = next(iter(tensors))
        return tensors | {first: tensors[first].flip(0)}

    changed = dict(TARGETS)
    changed[target] = replace(TARGETS[target], encode=damaged)
    monkeypatch.setattr(module, "TARGETS", changed)
    with pytest.raises(S2QError, match="nothing was exported"):
        s2q.export(made("cogvideox", CONVROT), to=target, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["diffusers", "sdnq"])
def test_both_transformers_are_exported_and_compared(made, target, tmp_path, monkeypatch):
    checkpoint = made("wan 2.2 a14b", CONVROT)
    report = s2q.export(checkpoint, to=target, out=tmp_path / "out")
    pipe = s2q.load(checkpoint, dtype="float32")
    linears = 0
    for component in ("transformer", "transformer_2"):
        tensors = load_file(tmp_path / f"out/{component}/diffusion_pytorch_model.safetensors")
        transformer = getattr(pipe, component)
        name = "blocks.0.attn1.to_q"
        layer = transformer.get_submodule(name)
        linears += len(transformer.config.quantization_config.layers)
        assert torch.equal(tensors["scale_shift_table"], transformer.scale_shift_table)
        assert torch.equal(tensors[f"{name}.bias"], layer.bias)
        stored, expected = (
            (tensors[f"{name}.weight"], layer.effective_weight(torch.float32))
            if target == "diffusers"
            else (tensors[f"{name}.scale"], layer.weight_scale.unsqueeze(1))
        )
        assert torch.equal(stored, expected)
    assert sum(report.linears.values()) == linears
    read = module.read_tensors

    def damaged(folder):
        tensors = read(folder)
        return tensors | {"scale_shift_table": -tensors["scale_shift_table"]} if folder.name[-1] == "2" else tensors

    monkeypatch.setattr(module, "read_tensors", damaged)
    with pytest.raises(S2QError, match="scale_shift_table: was read back with other values; nothing was exported"):
        s2q.export(checkpoint, to=target, out=tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()


def test_the_command_passes_its_options_on(monkeypatch, capsys):
    calls = []

    def export(model, **options):
        calls.append((model, *(options[name] for name in ("component", "variant", "verify", "overwrite"))))
        raise InvalidInputError("stop")

    monkeypatch.setattr(module, "export", export)
    arguments = ["export", "model", "--to", "sdnq", "-o", "out"]
    for more in ([], ["--variant", "fp16", "--no-verify"], ["--component", "transformer_2", "--verify", "--overwrite"]):
        assert run([*arguments, *more]) == 3
    capsys.readouterr()
    assert calls == [
        ("model", None, None, None, False),
        ("model", None, "fp16", False, False),
        ("model", "transformer_2", None, True, True),
    ]


def test_the_command_exports_once_and_again_with_overwrite(made, tmp_path, capsys):
    checkpoint, out = made("cogvideox", CONVROT), tmp_path / "out"
    arguments = ["export", str(checkpoint), "--to", "diffusers", "-o", str(out)]
    assert run([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["target"], result["recipe"], result["output"]) == ("diffusers", CONVROT, "out")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert run(arguments) == 3
    assert "exists; pass --overwrite" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert run([*arguments, "--overwrite"]) == 0
    (out / "mine.txt").write_text("x")
    assert run([*arguments, "--overwrite"]) == 3
    assert "mine.txt" in capsys.readouterr().err


def test_what_cannot_be_exported_is_named_and_nothing_is_written(made, tiny_model, tmp_path, capsys):
    out = ["-o", str(tmp_path / "out")]
    assert run(["export", str(tiny_model), "--to", "sdnq", *out]) == 3
    assert "is not an s2q checkpoint; quantize the model first" in " ".join(capsys.readouterr().err.split())
    assert run(["export", str(made("cogvideox", "rtn-w4a6")), "--to", "sdnq", *out]) == 3
    assert "activations of 6 bits" in " ".join(capsys.readouterr().err.split())
    assert run(["export", str(made("cogvideox", CONVROT)), "--to", "onnx", *out]) == 2
    with pytest.raises(InvalidInputError, match="unknown target 'sdqn'.*sdnq"):
        s2q.export(made("cogvideox", CONVROT), to="sdqn", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
