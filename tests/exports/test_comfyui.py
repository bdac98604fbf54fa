"""ComfyUI's file: bytes, marks and names, and comfy-kitchen's own code on them."""

import json

import pytest
import torch
from safetensors.torch import load_file

import s2q
from exported import OUTER, ROW, linear_of, packed_linears
from s2q.exports.layout import LAYOUTS
from s2q.exports.targets import TARGETS

NARROW = {"convrot-w4a4": ("skip=['*.ffn.net.2']",)}  # 96 channels, no multiple of 64
BLOCK_LINEARS = [f"{attention}.{part}" for attention in ("self_attn", "cross_attn") for part in "qkvo"] + ["ffn.0"]
UNQUANTIZED_INPUTS = {"format": "int8_tensorwise", "convrot": False, "full_precision_matrix_mult": True}
WIDE_MARKS = {
    "convrot-w4a8": {"format": "asym_w4a8_int8", "group_size": 64, "convrot_groupsize": 64},
    "convrot-w8a8": {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64},
    "convrot-w4a4": {"format": "convrot_w4a4", "convrot_groupsize": 64},
}
NARROW_MARKS = {
    "convrot-w4a8": {"format": "asym_w4a8_int8", "group_size": 96, "convrot_groupsize": 16},
    "convrot-w8a8": {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16},
}


@pytest.fixture(params=WIDE_MARKS)
def exported(request, made, tmp_path):
    """A recipe, the tensors of a file and the linears of the checkpoint by their names in it."""
    checkpoint = made("wan", request.param, *OUTER, *NARROW.get(request.param, ()))
    s2q.export(checkpoint, to="comfyui", out=tmp_path / "out.safetensors")
    layout = LAYOUTS["WanTransformer3DModel"]
    linears = {layout.linear_name(name): layer for name, layer in packed_linears(checkpoint)[1].items()}
    return request.param, load_file(tmp_path / "out.safetensors"), linears


def marks_of(tensors):
    end = ".comfy_quant"
    return {
        name.removesuffix(end): json.loads(bytes(tensor.tolist()))
        for name, tensor in tensors.items()
        if name.endswith(end)
    }


def codes_of(weight, mark):
    """Decode a stored weight without the code of s2q."""
    if mark["format"] == "int8_tensorwise":
        return weight
    byte = weight.view(torch.uint8).to(torch.int16)
    nibbles = torch.stack([byte & 15, byte >> 4], dim=-1).flatten(1)
    return (nibbles - 8 if mark["format"] == "asym_w4a8_int8" else (nibbles ^ 8) - 8).to(torch.int8)


def test_every_linear_is_marked(exported):
    recipe, tensors, _ = exported
    expected = {f"blocks.{block}.{name}": WIDE_MARKS[recipe] for block in (0, 1) for name in BLOCK_LINEARS}
    if recipe in NARROW_MARKS:
        expected |= {f"blocks.{block}.ffn.2": NARROW_MARKS[recipe] for block in (0, 1)}
    expected |= dict.fromkeys(("text_embedding.0", "text_embedding.2", "time_projection.1"), UNQUANTIZED_INPUTS)
    assert marks_of(tensors) == expected


def test_codes_scales_and_biases_are_those_of_the_checkpoint(exported):
    _, tensors, linears = exported
    marks = marks_of(tensors)
    assert marks.keys() == linears.keys()
    for name, layer in linears.items():
        stored = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.rpartition(".")[0] == name}
        assert torch.equal(codes_of(stored["weight"], marks[name]), layer.codes()), name
        assert torch.equal(stored["bias"], layer.bias), name
        kind = marks[name]["format"]
        scales = {"asym_w4a8_int8": ("weight_s_channel", "weight_s_rel")}.get(kind, ("weight_scale",))
        assert stored.keys() == {"weight", "bias", "comfy_quant", *scales}, name
        expected = layer.weight_scale.unsqueeze(1) if kind == "int8_tensorwise" else layer.weight_scale
        assert torch.equal(stored[scales[0]], expected), name
        if kind == "asym_w4a8_int8":
            assert torch.equal(stored["weight_s_rel"], torch.ones(layer.out_features, 1)), name


@pytest.mark.parametrize(
    ("bits", "activation", "row", "expected"),
    [
        (4, 8, ROW, [0xF0, 0x78, 0x69, 0x5A, 0x4B, 0x3C, 0x2D, 0x1E]),
        (4, 4, ROW, [0x78, 0xF0, 0xE1, 0xD2, 0xC3, 0xB4, 0xA5, 0x96]),
        (4, None, [-8, 7, 0, -1], [0xF8, 0x07, 0x00, 0xFF]),
        (8, 8, [-127, 127, 0, -1], [0x81, 0x7F, 0x00, 0xFF]),
    ],
    ids=["asym_w4a8_int8", "convrot_w4a4", "int8_tensorwise of 4 bits", "int8_tensorwise"],
)
def test_the_bytes_of_a_row(bits, activation, row, expected):
    layer, form = linear_of([row], [0.5], bits=bits, activation=activation)
    weight = TARGETS["comfyui"].encode(layer, form)["weight"]
    assert weight.dtype == torch.int8
    assert weight.view(torch.uint8).tolist() == [expected]


def test_comfy_kitchen_computes_every_linear_as_s2q(exported):
    eager = pytest.importorskip("comfy_kitchen.backends.eager")
    _, tensors, linears = exported
    marks, generator = marks_of(tensors), torch.Generator().manual_seed(0)
    for name, layer in linears.items():
        stored = {key: tensors.get(f"{name}.{key}") for key in ("weight", "weight_scale", "weight_s_rel", "bias")}
        mark = marks[name]
        x = torch.randn(40, layer.in_features, generator=generator)
        group = mark.get("convrot_groupsize")
        if mark["format"] == "asym_w4a8_int8":
            channel = tensors[f"{name}.weight_s_channel"]
            output = eager.w4a8_int8_linear(
                x, stored["weight"], stored["weight_s_rel"], channel, bias=stored["bias"], out_dtype=torch.float32,
                group_size=mark["group_size"], convrot_groupsize=group,
            )  # fmt: skip
        elif mark["format"] == "convrot_w4a4":
            output = eager.convrot_w4a4_linear(x, stored["weight"], stored["weight_scale"], stored["bias"], group)
        elif "full_precision_matrix_mult" in mark:
            assert layer.scheme.activation is None
            weight = stored["weight"].float() * stored["weight_scale"]
            output = torch.nn.functional.linear(x, weight, stored["bias"])
        else:
            output = eager.int8_linear(
                x, stored["weight"], stored["weight_scale"], stored["bias"], torch.float32, True, group
            )
        expected = layer(x)
        assert float((output - expected).abs().max() / expected.abs().max()) < 5e-6, name
