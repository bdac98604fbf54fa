"""Text encoders that a recipe quantizes: planned bytes, exact values, every door, and refusal of damaged files."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn

import s2q
from quick import quick
from s2q.checkpoint import MANIFEST, write_manifest
from s2q.common.components import text_encoders_of
from s2q.common.errors import InvalidInputError, S2QError
from s2q.exports import text_encoders as module
from s2q.nn import EncoderLinear, PackedLinear
from s2q.rounding import round_rtn
from tiny import tiny_call, tiny_pipeline

EIGHT = ("text_encoder.num_bits=8",)
FOUR = ("text_encoder.num_bits=4", "text_encoder.granularity=per_group", "text_encoder.group_size=16")
TENSOR = "encoder.block.0.layer.0.SelfAttention.q.packed"


@pytest.fixture(scope="module", params=quick(["wan", "hunyuanvideo", "ltx-2"], "ltx-2"))
def model(request, tmp_path_factory):
    """A pipeline of bf16 weights, its folder, and a checkpoint with encoders of 8 bits and one with grouped 4 bits."""
    folder = tmp_path_factory.mktemp("encoders")
    pipe = tiny_pipeline(request.param, dtype=torch.bfloat16)
    pipe.save_pretrained(folder / "full")
    full, checkpoints = folder / "full", {8: folder / "8", 4: folder / "4"}
    reports = {
        bits: s2q.quantize(full, recipe="rtn-w4a8", overrides=overrides, out=checkpoints[bits])
        for bits, overrides in ((8, EIGHT), (4, FOUR))
    }
    return SimpleNamespace(full=full, checkpoints=checkpoints, reports=reports, encoders=text_encoders_of(pipe))


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A checkpoint of a tiny Wan whose encoder has 8 bits; tests that alter it take a copy."""
    out = tmp_path_factory.mktemp("wan") / "checkpoint"
    s2q.quantize(tiny_pipeline("wan", dtype=torch.bfloat16), recipe="rtn-w4a8", overrides=EIGHT, out=out)
    return out


@pytest.fixture
def copy(wan, tmp_path):
    return shutil.copytree(wan, tmp_path / "copy")


def load_encoder(folder, component="text_encoder", **options):
    _, class_name = json.loads((folder / "model_index.json").read_text())[component]
    return getattr(transformers, class_name).from_pretrained(folder / component, **options)


def quantized(encoder):
    return {name: part for name, part in encoder.named_modules() if isinstance(part, EncoderLinear)}


def embeddings(encoder):
    with torch.no_grad():
        return encoder(input_ids=torch.arange(1, 9).unsqueeze(0))[0].float()


def num_bytes(folder):
    return sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())


@pytest.mark.parametrize("bits", [8, 4])
def test_the_bytes_of_the_files_are_planned_reported_and_inspected(model, bits):
    planned = s2q.plan(model.full, recipe="rtn-w4a8", overrides=EIGHT if bits == 8 else FOUR).text_encoders
    assert [encoder.component for encoder in planned] == list(model.encoders)
    for encoder in planned:
        assert encoder.quantized_bytes == num_bytes(model.checkpoints[bits] / encoder.component)
        assert encoder.full_precision_bytes == num_bytes(model.full / encoder.component)
        assert encoder.linears == len(quantized(load_encoder(model.checkpoints[bits], encoder.component)))
    assert s2q.inspect(model.checkpoints[bits], verify=True).text_encoders == planned
    assert [entry["quantized_bytes"] for entry in model.reports[bits].text_encoders] == [
        encoder.quantized_bytes for encoder in planned
    ]
    card = (model.checkpoints[bits] / "README.md").read_text()
    assert all(f"`{encoder.component}`, {encoder.scheme}" in card for encoder in planned)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [8, 4])
def test_loaded_weights_are_those_that_were_rounded_and_the_others_unchanged(model, bits, dtype):
    for component, full in model.encoders.items():
        encoder = load_encoder(model.checkpoints[bits], component, dtype=dtype)
        linears = quantized(encoder)
        for name, linear in linears.items():
            dense, packed = full.get_submodule(name), linear.packed
            rounded = round_rtn(dense.weight.detach(), packed.scheme.weight)
            expected = PackedLinear.from_rounded(rounded, bias=dense.bias, scheme=packed.scheme)
            assert torch.equal(packed.dequantized_weight(), expected.dequantized_weight())
            assert packed.weight_scale.dtype == torch.float32
            assert not packed.weight_scale.requires_grad
            if dense.bias is not None:
                assert torch.equal(packed.bias, dense.bias.to(dtype))
        others = {name: value for name, value in encoder.state_dict().items() if ".packed." not in name}
        assert others
        assert all(torch.equal(value, full.state_dict()[name].to(dtype)) for name, value in others.items())


def test_a_loaded_encoder_saved_again_has_the_same_tensors(model, tmp_path):
    for component in model.encoders:
        load_encoder(model.checkpoints[4], component, dtype=torch.bfloat16).save_pretrained(tmp_path / component)
        first, again = (folder / component / "model.safetensors" for folder in (model.checkpoints[4], tmp_path))
        assert first.read_bytes() == again.read_bytes()


def test_embeddings_are_close_at_8_bits_and_less_so_at_4(model):
    for component, full in model.encoders.items():
        expected = embeddings(full)
        errors = {
            bits: float((embeddings(load_encoder(folder, component, dtype=torch.bfloat16)) - expected).norm())
            for bits, folder in model.checkpoints.items()
        }
        assert 0 < errors[8] < 0.02 * float(expected.norm())
        assert 2 * errors[8] < errors[4] < 0.3 * float(expected.norm())


def test_the_run_leaves_the_pipeline_that_was_given(tmp_path):
    pipe = tiny_pipeline("hunyuanvideo")
    before = {name: encoder.config.to_dict() for name, encoder in text_encoders_of(pipe).items()}
    expected = embeddings(pipe.text_encoder)
    s2q.quantize(pipe, recipe="rtn-w4a8", overrides=EIGHT, out=tmp_path / "out")
    assert {name: encoder.config.to_dict() for name, encoder in text_encoders_of(pipe).items()} == before
    assert torch.equal(embeddings(pipe.text_encoder), expected)
    assert load_file(tmp_path / "out/text_encoder/model.safetensors")["embed_tokens.weight"].dtype == torch.float32


def test_a_recipe_without_the_key_leaves_the_files_of_encoders_as_they_are(tmp_path):
    pipe = tiny_pipeline("wan", dtype=torch.bfloat16)
    pipe.save_pretrained(tmp_path / "full")
    s2q.quantize(tmp_path / "full", recipe="rtn-w4a8", out=tmp_path / "out")
    first, second = (tmp_path / name / "text_encoder/model.safetensors" for name in ("full", "out"))
    assert first.read_bytes() == second.read_bytes()
    assert "quantization_config" not in json.loads((tmp_path / "out/text_encoder/config.json").read_text())
    assert s2q.inspect(tmp_path / "out").text_encoders == ()


@pytest.mark.parametrize("load", [s2q.load, DiffusionPipeline.from_pretrained])
def test_a_pipeline_computes_in_the_dtype_that_was_asked_for(wan, load):
    pipe = load(wan, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert quantized(pipe.text_encoder)
    assert {value.dtype for value in pipe.text_encoder.parameters() if value.dtype != torch.uint8} == {torch.float32}
    frames = pipe("a red circle", **tiny_call(pipe), output_type="pt").frames
    assert bool(torch.isfinite(frames).all())


def test_weights_in_shards_are_loaded(tmp_path):
    pipe = tiny_pipeline("wan", dtype=torch.bfloat16)
    s2q.quantize(pipe, recipe="rtn-w4a8", overrides=EIGHT, out=tmp_path / "out", max_shard_size="10KB")
    assert len(list((tmp_path / "out/text_encoder").glob("*.safetensors"))) > 1
    assert torch.isfinite(embeddings(s2q.load(tmp_path / "out").text_encoder)).all()


@pytest.mark.slow
@pytest.mark.parametrize("order", ["import s2q; import transformers as t", "import transformers as t; import s2q"])
def test_transformers_alone_loads_an_encoder_in_either_order_of_imports(wan, order):
    code = f"{order}; e = t.UMT5EncoderModel.from_pretrained(r'{wan / 'text_encoder'}'); print(e.hf_quantizer)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "StoredEncoderQuantizer" in run.stdout, run.stderr


def test_dequantize_gives_ordinary_linears(wan):
    encoder = load_encoder(wan, dtype=torch.float32)
    expected, linears = embeddings(encoder), quantized(encoder)
    encoder.dequantize()
    assert not quantized(encoder)
    assert all(type(encoder.get_submodule(name)) is nn.Linear for name in linears)
    assert not hasattr(encoder.config, "quantization_config")
    assert torch.allclose(embeddings(encoder), expected, atol=1e-5)


def test_dequantize_keeps_fp32_what_t5_keeps_in_an_fp16_model(tmp_path):
    pipe = tiny_pipeline("wan", dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "full")
    s2q.quantize(tmp_path / "full", recipe="rtn-w4a8", overrides=EIGHT, out=tmp_path / "out")
    plain, encoder = (load_encoder(tmp_path / name, dtype=torch.float16) for name in ("full", "out"))
    packed = {name: part.packed for name, part in encoder.named_modules() if isinstance(part, EncoderLinear)}
    expected = {name: value.dtype for name, value in plain.state_dict().items()}
    assert {torch.float16, torch.float32} == set(expected.values())
    encoder.dequantize()
    assert {name: value.dtype for name, value in encoder.state_dict().items()} == expected
    wo = next(name for name in packed if name.endswith(".wo"))
    assert torch.equal(encoder.get_submodule(wo).weight, packed[wo].dequantized_weight())
    s2q.export(tmp_path / "out", to="diffusers", out=tmp_path / "dense")
    stored = load_file(tmp_path / "dense/text_encoder/model.safetensors")
    assert {name: value.dtype for name, value in stored.items()} == {name: expected[name] for name in stored}
    assert torch.equal(stored[f"{wo}.weight"], encoder.get_submodule(wo).weight)


def drop(tensors):
    del tensors[f"{TENSOR}.weight_scale"]


def reshape(tensors):
    tensors[f"{TENSOR}.weight"] = tensors[f"{TENSOR}.weight"][:, :-1].contiguous()


def spoil(tensors):
    tensors[f"{TENSOR}.weight_scale"][0] = float("nan")


def widen(tensors):
    tensors[f"{TENSOR}.weight_scale"] = tensors[f"{TENSOR}.weight_scale"].float()


def add(tensors):
    tensors["encoder.block.0.layer.0.SelfAttention.r.packed.weight_scale"] = torch.ones(3)


def drop_norm(tensors):
    del tensors["encoder.final_layer_norm.weight"]


def spoil_norm(tensors):
    tensors["encoder.final_layer_norm.weight"][0] = float("inf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, rf"checkpoint lacks 1 tensor, {TENSOR}.weight_scale among them"),
        (drop_norm, r"checkpoint lacks 1 tensor, encoder.final_layer_norm.weight among them"),
        (reshape, rf"{TENSOR}.weight: got shape \[32, 31\], expected \[32, 32\]"),
        (widen, rf"{TENSOR}.weight_scale: got dtype F32, expected BF16"),
        (add, r"SelfAttention.r.packed.weight_scale is in the file but not in UMT5EncoderModel"),
        (spoil, rf"{TENSOR}.weight_scale: contains scales that are not positive and finite"),
        (spoil_norm, r"encoder.final_layer_norm.weight: contains NaN or infinite values"),
    ],
)
def test_tensors_that_are_not_those_of_the_encoder_are_refused_at_every_door(copy, change, message):
    path = copy / "text_encoder/model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    write_manifest(copy)  # as whoever gives the file to others can
    for door in (load_encoder, s2q.load, DiffusionPipeline.from_pretrained):
        with pytest.raises(InvalidInputError, match=message) as caught:
            door(copy)
        assert "\n" not in str(caught.value)


def test_a_flipped_byte_is_found_at_every_door(copy):
    path = copy / "text_encoder/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    for door in (load_encoder, s2q.load, DiffusionPipeline.from_pretrained):
        with pytest.raises(InvalidInputError, match=r"text_encoder/model\.safetensors: its SHA-256 differs"):
            door(copy)


def test_a_configuration_of_another_model_is_refused(copy):
    path = copy / "text_encoder/config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["layers"]["encoder.nothing"] = "w8a16"
    path.write_text(json.dumps(config))
    write_manifest(copy)
    for door in (load_encoder, s2q.load, s2q.inspect):
        with pytest.raises(InvalidInputError, match=r"encoder.nothing is in quantization_config, but UMT5"):
            door(copy)


def test_groups_that_fit_no_linear_are_refused_before_any_compute(tmp_path):
    tiny_pipeline("wan").save_pretrained(tmp_path / "full")
    overrides = [*EIGHT, "text_encoder.granularity=per_group", "text_encoder.group_size=256"]
    for verb in (s2q.plan, s2q.quantize):
        out = {"out": tmp_path / "out"} if verb is s2q.quantize else {}
        with pytest.raises(InvalidInputError, match=r"text_encoder: w8g256a16 fits none.*text_encoder\.group_size"):
            verb(tmp_path / "full", recipe="rtn-w4a8", overrides=overrides, **out)
    assert not (tmp_path / "out").exists()


def test_an_encoder_that_is_quantized_or_not_finite_is_refused(wan, tmp_path):
    pipe = tiny_pipeline("wan", dtype=torch.bfloat16)
    encoder, pipe.text_encoder = pipe.text_encoder, load_encoder(wan, dtype=torch.bfloat16)
    with pytest.raises(InvalidInputError, match=r"its text_encoder is already quantized \(by s2q\)"):
        s2q.quantize(pipe, recipe="rtn-w4a8", overrides=EIGHT, out=tmp_path / "out")
    pipe.text_encoder = encoder
    with torch.no_grad():
        next(encoder.parameters())[0, 0] = float("nan")
    with pytest.raises(InvalidInputError, match=r"text_encoder.shared.weight contains 1 NaN"):
        s2q.quantize(pipe, recipe="rtn-w4a8", overrides=EIGHT, out=tmp_path / "out")


def test_exports_dequantize_it_or_refuse_it(wan, tmp_path):
    s2q.export(wan, to="diffusers", out=tmp_path / "dense")
    dense = load_encoder(tmp_path / "dense", dtype=torch.bfloat16)
    expected = load_encoder(wan, dtype=torch.bfloat16).dequantize().state_dict()
    assert not hasattr(dense.config, "quantization_config")
    assert dense.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in dense.state_dict().items())
    with pytest.raises(InvalidInputError, match=r"text_encoder: sdnq cannot store.*text_encoder=null, or export to"):
        s2q.export(wan, to="sdnq", out=tmp_path / "sdnq")


def test_an_encoder_that_is_read_back_with_other_values_is_not_exported(wan, tmp_path, monkeypatch):
    read, name = module.read_tensors, "encoder.final_layer_norm.weight"

    def damaged(folder, **options):
        tensors = read(folder, **options)
        return tensors | {name: tensors[name] + 1}

    monkeypatch.setattr(module, "read_tensors", damaged)
    with pytest.raises(S2QError, match=rf"^text_encoder.{name}: was read back with other values; nothing was exported"):
        s2q.export(wan, to="diffusers", out=tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_an_encoder_without_the_variant_of_the_others_is_exported(copy, tmp_path):
    (copy / MANIFEST).unlink()
    for path in (*copy.glob("transformer/*.safetensors"), *copy.glob("vae/*.safetensors")):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    s2q.export(copy, to="diffusers", out=tmp_path / "dense", variant="fp16")
    assert not quantized(load_encoder(tmp_path / "dense"))


def test_linears_that_t5_keeps_in_fp32_do_not_overflow_in_fp16(wan):
    encoder = load_encoder(wan, dtype=torch.float16)
    linears = {name: part for name, part in encoder.named_modules() if isinstance(part, EncoderLinear)}
    assert {name.rpartition(".")[2] for name, part in linears.items() if part.in_fp32} == {"wo"}
    wo = next(part for part in linears.values() if part.in_fp32)
    large = torch.full((1, 2, wo.packed.in_features), 6e4, dtype=torch.float16)
    output = wo(large)
    assert output.dtype == torch.float32
    assert torch.equal(output, wo.packed(large.float()))
    assert wo(large.bfloat16()).dtype == torch.bfloat16
    ids = torch.tensor([[3, 7, 5, 1]])
    with torch.no_grad():
        half, full = (load_encoder(wan, dtype=dtype)(ids)[0].float() for dtype in (torch.float16, torch.float32))
    assert float((half - full).norm() / full.norm()) < 0.01


def test_a_folder_that_is_no_component_is_no_encoder(copy):
    shutil.copytree(copy / "text_encoder", copy / "text_encoder_old")
    write_manifest(copy)
    (encoder,) = s2q.inspect(copy).text_encoders
    assert encoder.component == "text_encoder"
