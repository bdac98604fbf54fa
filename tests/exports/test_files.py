"""Exports that are one file: published names, the readers' own code, and refusals."""

import importlib.util
import json
from types import SimpleNamespace

import diffusers
import pytest
import torch
from safetensors.torch import load_file

import s2q
from s2q.checkpoint import S2QConfig
from s2q.common.errors import InvalidInputError, S2QError, UsageError
from s2q.core.input_path import InputPath
from s2q.exports.export import _marks
from s2q.exports.layout import LAYOUTS, check_layout
from s2q.exports.target import LinearForm, linear_forms
from s2q.exports.targets import TARGETS
from s2q.recipes.load import load_recipe

GROUPS = ("weights={num_bits: 4, granularity: per_group, group_size: 32}", "outer=null")
MODELS = {
    "wan": (diffusers.WanTransformer3DModel, {"num_layers": 1, "added_kv_proj_dim": 5120, "image_dim": 1280}),
    "hunyuanvideo": (diffusers.HunyuanVideoTransformer3DModel, {"num_layers": 1, "num_single_layers": 1}),
    "ltx": (diffusers.LTXVideoTransformer3DModel, {"num_layers": 1}),
}
PUBLISHED = {
    "wan": {"patch_embedding.weight", "blocks.0.self_attn.q.weight", "blocks.0.cross_attn.k_img.weight"}
    | {"blocks.0.ffn.0.bias", "blocks.0.modulation", "head.modulation", "head.head.weight", "time_projection.1.bias"},
    "hunyuanvideo": {"double_blocks.0.img_attn_qkv.weight", "double_blocks.0.txt_mod.linear.bias", "img_in.proj.weight"}
    | {"single_blocks.0.linear1.weight", "single_blocks.0.modulation.linear.weight", "vector_in.in_layer.weight"}
    | {"txt_in.individual_token_refiner.blocks.0.self_attn_qkv.weight", "final_layer.adaLN_modulation.1.weight"},
    "ltx": {"patchify_proj.weight", "adaln_single.emb.timestep_embedder.linear_1.weight"}
    | {"transformer_blocks.0.attn1.q_norm.weight", "transformer_blocks.0.ff.net.2.bias"},
}


@pytest.mark.parametrize("name", MODELS)
def test_diffusers_converts_every_layout_back(name):
    model_class, config = MODELS[name]
    with torch.device("meta"):
        model = model_class(**config)
    layout = LAYOUTS[model_class.__name__]
    check_layout(model, layout)
    rows = {key: torch.empty(tensor.shape[0]) for key, tensor in model.state_dict().items()}
    assert set(layout.to_original(rows)) >= PUBLISHED[name]


def test_a_layout_that_loses_a_name_is_refused():
    with torch.device("meta"):
        model = diffusers.HunyuanVideoTransformer3DModel(num_layers=1, num_single_layers=1, num_attention_heads=2)
    with pytest.raises(InvalidInputError, match="does not convert its original layout back"):
        check_layout(model, LAYOUTS["HunyuanVideoTransformer3DModel"])


def test_comfyui_gets_the_linear_that_tells_it_the_width_of_ltx_texts_unquantized_or_in_8_bits():
    model_class, config = MODELS["ltx"]
    with torch.device("meta"):
        model = model_class(**config)
    layout, target = LAYOUTS[model_class.__name__], TARGETS["comfyui"]

    def marks(recipe, *names):
        schemes = {f"transformer_blocks.0.attn2.{name}": load_recipe(recipe).linear_scheme() for name in names}
        made = S2QConfig.from_schemes(schemes, recipe=recipe, compute_dtype="float32")
        return _marks(model, linear_forms(model, made), layout, target)

    with pytest.raises(
        InvalidInputError, match=r"attn2.to_k: .*width of the text.*skip=\['transformer_blocks.0.attn2.to_k'\]"
    ):
        marks("convrot-w4a8", "to_q", "to_k")
    assert len(marks("convrot-w8a8", "to_q", "to_k")) == 2
    assert len(marks("convrot-w4a8", "to_q", "to_v")) == 2


def packed_linears(checkpoint):
    transformer = s2q.load(checkpoint, dtype="float32", backend="reference").transformer
    names = transformer.config.quantization_config.layers
    return transformer, {name: transformer.get_submodule(name) for name in names}


@pytest.mark.parametrize("recipe", ["convrot-w4a8", "convrot-w8a8", "convrot-w4a4"])
def test_comfy_kitchen_computes_every_linear_of_a_model_as_s2q(made, recipe, tmp_path):
    eager = pytest.importorskip("comfy_kitchen.backends.eager")
    narrow = ["skip=['*.ffn.net.2']"] if recipe == "convrot-w4a4" else []  # 96 channels, no multiple of 64
    checkpoint, out = made("wan", recipe, "outer={num_bits: 8}", *narrow), tmp_path / "out.safetensors"
    s2q.export(checkpoint, to="comfyui", out=out)
    tensors, (_, linears) = load_file(out), packed_linears(checkpoint)
    layout, generator = LAYOUTS["WanTransformer3DModel"], torch.Generator().manual_seed(0)
    for name, layer in linears.items():
        original = layout.linear_name(name)
        stored = {key: tensors.get(f"{original}.{key}") for key in ("weight", "weight_scale", "weight_s_rel", "bias")}
        mark = json.loads(bytes(tensors[f"{original}.comfy_quant"].tolist()))
        x = torch.randn(40, layer.in_features, generator=generator)
        group = mark.get("convrot_groupsize")
        if mark["format"] == "asym_w4a8_int8":
            channel = tensors[f"{original}.weight_s_channel"]
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


def test_ggufs_reader_in_diffusers_gets_equal_weights(made, tmp_path):
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("gguf is not installed")
    checkpoint, out = made("wan", "rtn-w4a16", *GROUPS), tmp_path / "out.gguf"
    report = s2q.export(checkpoint, to="gguf", out=out)
    assert report.largest_difference == 0  # fp16 has the scales, which are bf16 values
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


def test_ggufs_round_fp32_scales_of_older_checkpoints_within_the_bound():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (16, 64), dtype=torch.int8, generator=generator)
    scale = torch.rand(16, 2, generator=generator) * 0.01 + 1e-3
    scheme = load_recipe("rtn-w4a16", overrides=list(GROUPS)).linear_scheme()
    form = LinearForm(name="x", in_features=64, out_features=16, scheme=scheme, path=InputPath(), dtype=torch.float32)
    layer = SimpleNamespace(codes=lambda: codes, weight_scale=scale, bias=None)
    expected = codes * scale.repeat_interleave(32, dim=1)
    difference = (TARGETS["gguf"].decode(TARGETS["gguf"].encode(layer, form), form) - expected).abs().max()
    assert 0 < float(difference / expected.abs().max()) <= 2**-11


def test_ggufs_are_read_as_they_were_written(tmp_path):
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


@pytest.mark.parametrize(("target", "name"), [("gguf", "out.gguf"), ("comfyui", "out.safetensors")])
def test_a_file_is_refused_with_the_reason_and_nothing_is_written(made, target, name, tmp_path, monkeypatch):
    fitting = ("rtn-w4a16", *GROUPS) if target == "gguf" else ("convrot-w4a8",)
    out = tmp_path / name
    with pytest.raises(UsageError, match="whose name ends in"):
        s2q.export(made("wan", *fitting), to=target, out=tmp_path / "folder")
    with pytest.raises(InvalidInputError, match="does not know the original names of CogVideoXTransformer3DModel"):
        s2q.export(made("cogvideox", *fitting, "modulation=null"), to=target, out=out)
    with pytest.raises(InvalidInputError, match=rf"{target} cannot store .*; quantize the model with s2q-export"):
        s2q.export(made("wan", "rtn-w4a8"), to=target, out=out)
    file = TARGETS[target].file
    monkeypatch.setattr(
        "s2q.exports.export.TARGETS",
        {target: _replaced(TARGETS[target], file=_replaced(file, read=lambda path: _damaged(file.read(path))))},
    )
    with pytest.raises(S2QError, match="nothing was exported"):
        s2q.export(made("wan", *fitting), to=target, out=out)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    s2q.export(made("wan", *fitting), to=target, out=out)
    with pytest.raises(InvalidInputError, match="exists; pass --overwrite"):
        s2q.export(made("wan", *fitting), to=target, out=out)
    before = out.read_bytes()
    s2q.export(made("wan", *fitting), to=target, out=out, overwrite=True)
    assert out.read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]


def _replaced(record, **changes):
    from dataclasses import replace

    return replace(record, **changes)


def _damaged(result):
    tensors, marks = result
    name = next(name for name in tensors if name.endswith("ffn.0.weight"))
    return tensors | {name: tensors[name].flip(0)}, marks


def test_parts_of_a_fused_linear_with_other_formats_are_refused():
    model_class, config = MODELS["hunyuanvideo"]
    with torch.device("meta"):
        model = model_class(**config)
    layout, target = LAYOUTS[model_class.__name__], TARGETS["comfyui"]
    scheme = S2QConfig.from_schemes
    one = scheme(
        {"transformer_blocks.0.attn.to_q": load_recipe("convrot-w8a8").linear_scheme()},
        recipe="x",
        compute_dtype="float32",
    )
    with pytest.raises(InvalidInputError, match=r"as a part of double_blocks.0.img_attn_qkv, whose other parts"):
        _marks(model, linear_forms(model, one), layout, target)
