"""ComfyUI's file: bytes, marks and names, and comfy-kitchen's own code on them."""

import json

import pytest
import torch
from safetensors.torch import load_file

import s2q
from exported import OUTER, ROW, TABLE, form_of, linear_of, packed_linears
from s2q.core.codebook import FP8_SCALES, FP8_TABLE_NUMBER, TABLES
from s2q.core.qparams import RoundedWeight
from s2q.core.schemes import LinearScheme
from s2q.exports.layout import LAYOUTS
from s2q.exports.targets import TARGETS
from s2q.nn import PackedLinear
from schemes import activations, weights

CASES = {
    "convrot-w4a8": ("convrot-w4a8",),
    "convrot-w4a8 table": ("convrot-w4a8", *TABLE),
    "convrot-w8a8": ("convrot-w8a8",),
    "convrot-w4a4": ("convrot-w4a4", "skip=['*.ffn.net.2']"),  # 96 channels, no multiple of 64
}
BLOCK_LINEARS = [f"{attention}.{part}" for attention in ("self_attn", "cross_attn") for part in "qkvo"] + ["ffn.0"]
UNQUANTIZED_INPUTS = {"format": "int8_tensorwise", "convrot": False, "full_precision_matrix_mult": True}
WIDE_MARKS = {
    "convrot-w4a8": {"format": "asym_w4a8_int8", "group_size": 64, "convrot_groupsize": 64},
    "convrot-w4a8 table": {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 64},
    "convrot-w8a8": {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64},
    "convrot-w4a4": {"format": "convrot_w4a4", "convrot_groupsize": 64},
}
NARROW_MARKS = {
    "convrot-w4a8": {"format": "asym_w4a8_int8", "group_size": 96, "convrot_groupsize": 16},
    "convrot-w4a8 table": {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 16},
    "convrot-w8a8": {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16},
}


@pytest.fixture(params=CASES)
def exported(request, made, tmp_path):
    """A recipe, the tensors of a file and the linears of the checkpoint by their names in it."""
    checkpoint = made("wan", *CASES[request.param], *OUTER)
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
        books = set() if layer.weight_group_scale is None else {"weight_codebook"}
        assert stored.keys() == {"weight", "bias", "comfy_quant", *scales, *books}, name
        expected = layer.weight_scale.unsqueeze(1) if kind == "int8_tensorwise" else layer.weight_scale
        assert torch.equal(stored[scales[0]], expected), name
        if books:
            assert stored["weight_s_rel"].dtype == torch.float8_e4m3fn, name
            assert torch.equal(stored["weight_s_rel"].float(), (layer.weight_group_scale >> 2).float()), name
        elif kind == "asym_w4a8_int8":
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
                group_size=mark["group_size"], convrot_groupsize=group, codebook=tensors.get(f"{name}.weight_codebook"),
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


def test_every_value_of_a_table_is_that_of_the_levels_and_the_scale_in_a_file():
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(1, len(FP8_SCALES))
    groups = torch.tensor([[scale << 2 | FP8_TABLE_NUMBER for scale in FP8_SCALES]], dtype=torch.int8)
    layer = PackedLinear.from_rounded(
        RoundedWeight(codes=codes, scale=torch.ones(1), group_scale=groups),
        bias=None,
        scheme=LinearScheme(weight=weights(4, group_size=16, levels="fp8_table"), activation=activations(8)),
    )
    tensors = TARGETS["comfyui"].encode(layer, form_of(layer))
    assert tensors["weight_s_rel"].float().tolist() == [[float(scale) for scale in FP8_SCALES]]
    levels = (torch.tensor(TABLES[FP8_TABLE_NUMBER]) + 2.0**-10) / 32  # of the codebook in a file
    values = levels[codes.int() + 8].view(-1, 16) * tensors["weight_s_rel"].float().view(-1, 1)
    assert torch.equal(values.round().flatten(), layer.product_codes().flatten().float())


def test_the_files_of_a_table_have_the_codebook_of_that_test(made, tmp_path):
    s2q.export(made("wan", "convrot-w4a8", *TABLE), to="comfyui", out=tmp_path / "out.safetensors")
    tensors = load_file(tmp_path / "out.safetensors")
    books = [tensor for name, tensor in tensors.items() if name.endswith(".weight_codebook")]
    assert len(books) == sum(mark["format"] == "asym_w4a8_int8" for mark in marks_of(tensors).values())
    assert all(torch.equal(book, (torch.tensor(TABLES[FP8_TABLE_NUMBER]) + 2.0**-10) / 32) for book in books)
