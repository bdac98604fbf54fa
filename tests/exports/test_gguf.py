"""GGUF files: their bytes, what is read back, and diffusers' reader on one."""

import diffusers
import pytest
import torch

import s2q
from exported import GROUPS, ROW, linear_of, packed_linears
from s2q.exports.targets import TARGETS

BLOCK = [*ROW, *reversed(ROW)]
FILE = b"".join(
    [
        b"GGUF" + b"\3\0\0\0" + b"\2\0\0\0\0\0\0\0" + b"\3\0\0\0\0\0\0\0",  # version, tensors, pairs
        b"\x14\0\0\0\0\0\0\0general.architecture" + b"\x08\0\0\0" + b"\3\0\0\0\0\0\0\0wan",
        b"\x14\0\0\0\0\0\0\0general.quantized_by" + b"\x08\0\0\0" + b"\x0a\0\0\0\0\0\0\0s2q export",
        b"\x1c\0\0\0\0\0\0\0general.quantization_version" + b"\x04\0\0\0" + b"\2\0\0\0",
        b"\x08\0\0\0\0\0\0\0a.weight" + b"\2\0\0\0",  # dimensions: 32, 1; type 2, at 0
        b"\x20\0\0\0\0\0\0\0" + b"\1\0\0\0\0\0\0\0" + b"\2\0\0\0" + b"\0\0\0\0\0\0\0\0",
        b"\1\0\0\0\0\0\0\0b" + b"\1\0\0\0",  # a dimension: 2; type 0, at 32
        b"\2\0\0\0\0\0\0\0" + b"\0\0\0\0" + b"\x20\0\0\0\0\0\0\0",
    ]
)


def test_the_bytes_of_blocks():
    target = TARGETS["gguf"]
    rising = [*range(-8, 8), *range(7, -9, -1)]
    layer, form = linear_of([rising], [[0.5]], group_size=32)
    expected = "0038 f0e1d2c3b4a5968778695a4b3c2d1e0f"
    assert bytes(target.encode(layer, form)["weight"][0].tolist()) == bytes.fromhex(expected)
    layer, form = linear_of([[*range(-16, 16)]], [[0.5]], bits=8, group_size=32)
    expected = "0038 f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff000102030405060708090a0b0c0d0e0f"
    assert bytes(target.encode(layer, form)["weight"][0].tolist()) == bytes.fromhex(expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_block_is_decoded_to_what_s2q_computes(bits):
    layer, form = linear_of([[*BLOCK, *ROW, *ROW]] * 2, [[0.5, 0.25], [2.0, 1.0]], bits=bits, group_size=32)
    target = TARGETS["gguf"]
    assert target.kind(form) == {4: "Q4_0", 8: "Q8_0"}[bits]
    assert torch.equal(target.decode(target.encode(layer, form), form), layer.effective_weight(torch.float32))


def test_the_bytes_of_a_file(tmp_path):
    block = bytes(range(18))
    tensors = {"a.weight": torch.tensor([[*block]], dtype=torch.uint8), "b": torch.tensor([1.0, -2.0])}
    TARGETS["gguf"].file.write(tmp_path / "x.gguf", tensors, {"a": "Q4_0"}, "wan")
    padded = FILE + bytes(-len(FILE) % 32) + block + bytes(14) + b"\0\0\x80\x3f\0\0\0\xc0" + bytes(24)
    assert (tmp_path / "x.gguf").read_bytes() == padded


def test_files_are_read_as_they_were_written(tmp_path):
    tensors = {
        "a.weight": torch.arange(36, dtype=torch.uint8).reshape(1, 36),
        "b": torch.randn(2, 1, 3, 2, 2),
        "c.weight": torch.randn(3, 5).bfloat16(),
        "d": torch.randn(7),
    }
    file = TARGETS["gguf"].file
    file.write(tmp_path / "x.gguf", tensors, {"a": "Q4_0"}, "wan")
    read, marks = file.read(tmp_path / "x.gguf")
    assert marks == {"a": "Q4_0"}
    assert list(read) == list(tensors)
    assert all(read[name].dtype == tensor.dtype and torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_fp32_scales_of_older_checkpoints_are_rounded_within_the_bound():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (16, 64), dtype=torch.int8, generator=generator)
    scale = torch.rand(16, 2, generator=generator) * 0.01 + 1e-3
    layer, form = linear_of(codes.tolist(), scale.tolist(), group_size=32)
    layer.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
    expected = codes * scale.repeat_interleave(32, dim=1)
    target = TARGETS["gguf"]
    difference = (target.decode(target.encode(layer, form), form) - expected).abs().max()
    assert 0 < float(difference / expected.abs().max()) <= 2**-11


@pytest.mark.parametrize("bits", [4, 5])
def test_a_file_has_the_weights_of_its_checkpoint(made, tmp_path, bits):
    overrides = (GROUPS[0].replace("num_bits: 4", f"num_bits: {bits}"), GROUPS[1])
    checkpoint, out = made("wan", "rtn-w4a16", *overrides), tmp_path / "out.gguf"
    report = s2q.export(checkpoint, to="gguf", out=out)
    assert report.largest_difference == 0  # fp16 has the scales, which are bf16 values
    assert report.linears == {"Q4_0" if bits == 4 else "Q8_0": 20}
    tensors, marks = TARGETS["gguf"].file.read(out)
    layer = packed_linears(checkpoint)[1]["blocks.0.attn1.to_q"]
    assert marks["blocks.0.self_attn.q"] == ("Q4_0" if bits == 4 else "Q8_0")
    blocks = tensors["blocks.0.self_attn.q.weight"].reshape(64, 2, -1)
    assert torch.equal(blocks[..., :2].contiguous().view(torch.float16)[..., 0].float(), layer.weight_scale)
    data = blocks[..., 2:]
    codes = torch.cat([data & 15, data >> 4], dim=-1).char() - 8 if bits == 4 else data.contiguous().view(torch.int8)
    assert torch.equal(codes.flatten(1), layer.codes())


def test_the_reader_of_diffusers_gets_equal_weights(made, tmp_path):
    pytest.importorskip("gguf")
    checkpoint, out = made("wan", "rtn-w4a16", *GROUPS), tmp_path / "out.gguf"
    s2q.export(checkpoint, to="gguf", out=out)
    transformer, linears = packed_linears(checkpoint)
    model = diffusers.WanTransformer3DModel.from_single_file(
        str(out),
        config=str(checkpoint),
        subfolder="transformer",
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    for name, layer in linears.items():
        codes = layer.codes().float().unflatten(1, (-1, 32))
        expected = (codes.half() * layer.weight_scale.half().unsqueeze(-1)).flatten(1)  # diffusers multiplies in fp16
        assert torch.equal(dequantize_gguf_tensor(model.get_submodule(name).weight), expected), name
        assert torch.equal(model.get_submodule(name).bias, layer.bias)
    others = {
        name: tensor for name, tensor in transformer.state_dict().items() if name.rpartition(".")[0] not in linears
    }
    assert all(torch.equal(model.state_dict()[name], tensor.float()) for name, tensor in others.items())
