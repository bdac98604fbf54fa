"""Checkpoints of other programs as checkpoints of s2q: the codes, scales, biases and branches that they have."""

import json
import shutil

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from safetensors.torch import load_file, save_file

import s2q
from exported import (
    BRANCH,
    CONVROT,
    FILE_LINEAR,
    GROUPS,
    LINEAR,
    OUTER,
    TABLE,
    WEIGHTS,
    assert_refused,
    packed_linears,
)
from quick import slow
from s2q.checkpoint import MANIFEST, read_config, verify_manifest
from s2q.cli import run
from s2q.common.cards import read_card
from s2q.common.errors import InvalidInputError, S2QError, UsageError
from s2q.common.records import EXPORT_RECORD
from s2q.core.codebook import FP8_TABLE_NUMBER, TABLES
from s2q.exports import convert as module
from s2q.exports.layout import LAYOUTS
from s2q.exports.reading import _marked_names, apart
from s2q.exports.sdnq import linear_options
from s2q.generation.defaults import generation_defaults
from s2q.shapes.embedded import embedded_folder
from tiny import TINY_CALL, tiny_pipeline, tiny_transformer

BOOK = (torch.tensor(TABLES[FP8_TABLE_NUMBER]) + 2.0**-10) / 32
"""The levels of a table in a file."""
IN_GROUPS, GROUPS_OF_2 = (
    {
        "comfy_quant": {"format": "asym_w4a8_int8", "convrot_groupsize": 64, "group_size": size},
        "weight_s_rel": torch.ones(64, 64 // size),
    }
    for size in (16, 2)
)
"""Parts of a linear of 64 channels."""
GROUPS_OF_8_BITS = (GROUPS[0].replace("num_bits: 4", "num_bits: 8"), GROUPS[1])


def assert_equal_linears(converted, checkpoint):
    ours, theirs = packed_linears(converted)[1], packed_linears(checkpoint)[1]
    assert ours.keys() == theirs.keys()
    for name, layer in theirs.items():
        assert (ours[name].scheme, ours[name].path) == (layer.scheme, layer.path), name
        tensors = {part: tensor for part, tensor in layer.named_parameters() if part != "weight"}
        assert {part for part, _ in ours[name].named_parameters()} == {*tensors, "weight"}
        assert torch.equal(ours[name].codes(), layer.codes()), name
        for part, tensor in tensors.items():
            assert torch.equal(getattr(ours[name], part), tensor), f"{name}.{part}"


@pytest.mark.parametrize(
    "recipe",
    [(CONVROT, *BRANCH, *OUTER), slow(("convrot-w8a8", *BRANCH)), slow(("rtn-w4a8",)), ("rtn-w4a16", *GROUPS)]
    + [slow(("rtn-w4a16", *GROUPS_OF_8_BITS)), slow(("s2q-export-branch-w4a8",))],
    ids=" ".join,
)
def test_an_export_to_sdnq_gives_the_linears_of_its_checkpoint(made, recipe, tmp_path):
    checkpoint = made("cogvideox", *recipe)
    s2q.export(checkpoint, to="sdnq", out=tmp_path / "sdnq")
    report = s2q.convert(tmp_path / "sdnq", out=tmp_path / "out")
    assert_equal_linears(tmp_path / "out", checkpoint)
    assert (tmp_path / "out" / WEIGHTS).stat().st_size == (checkpoint / WEIGHTS).stat().st_size
    assert report.largest_difference < 5e-6
    assert report.writer == f"s2q export of {recipe[0]}"


@pytest.mark.parametrize(
    "recipe",
    [
        (CONVROT, *OUTER),
        slow(("convrot-w8a8",)),
        (CONVROT, *TABLE),
        ("convrot-w4a4", *OUTER, "skip=['*.ffn.net.2']"),
        slow(("rtn-w4a16",)),
    ],
    ids=" ".join,
)
def test_an_export_to_comfyui_gives_the_linears_of_its_checkpoint(made, recipe, tmp_path):
    checkpoint = made("wan", *recipe)
    s2q.export(checkpoint, to="comfyui", out=tmp_path / "model.safetensors")
    report = s2q.convert(tmp_path / "model.safetensors", out=tmp_path / "out", base=checkpoint)
    assert_equal_linears(tmp_path / "out", checkpoint)
    assert (report.largest_difference, report.writer) == (0, "s2q export")


def test_the_mark_of_a_fused_linear_is_that_of_its_parts():
    with torch.device("meta"):
        model = tiny_transformer("hunyuanvideo")
    mark = {"format": "int8_tensorwise"}
    marks = {"double_blocks.0.txt_attn_qkv": mark}
    names = [f"transformer_blocks.0.attn.add_{part}_proj" for part in "qkv"]
    assert _marked_names(model, LAYOUTS[type(model).__name__], marks) == dict.fromkeys(names, mark)
    with pytest.raises(InvalidInputError, match="x.y: is marked as quantized, but Hunyuan"):
        _marked_names(model, LAYOUTS[type(model).__name__], {"x.y": mark})


def test_both_transformers_are_converted(made, tmp_path):
    checkpoint = made("wan 2.2 a14b", CONVROT)
    s2q.export(checkpoint, to="sdnq", out=tmp_path / "sdnq")
    s2q.convert(tmp_path / "sdnq", out=tmp_path / "out")
    ours, theirs = s2q.load(tmp_path / "out"), s2q.load(checkpoint)
    for component in ("transformer", "transformer_2"):
        expected = getattr(theirs, component).state_dict()
        tensors = getattr(ours, component).state_dict()
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def test_the_records_of_a_conversion(sdnq, made, tmp_path, capsys):
    folder, out = sdnq((CONVROT,)), tmp_path / "out"
    assert run(["convert", str(folder), "-o", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["tool"], result["tool_version"], result["compared_version"]) == ("sdnq", "0.2.8", "0.2.8")
    assert result["linears"] == {"w4a8": 12, "w4a16": 4}
    assert json.loads((out / "s2q/convert.json").read_text()) == result
    inspected = s2q.inspect(out, verify=True)
    assert (inspected.recipe, inspected.format_version, inspected.verified) == ("sdnq-w4a8", 4, True)
    writer = f"s2q export of {CONVROT}"
    assert inspected.converted == {"tool": "sdnq", "tool_version": "0.2.8", "writer": writer}
    assert inspected.storage["quantized_bytes"] == result["storage"]["quantized_bytes"]
    assert [layer.bytes for layer in inspected.layers] == [layer["bytes"] for layer in result["layers"]]
    assert s2q.inspect(made("cogvideox", CONVROT)).converted is None
    assert run(["inspect", str(out)]) == 0
    assert f"converted from sdnq 0.2.8, written by {writer}\n" in capsys.readouterr().out
    words = "`s2q convert` kept its codes and scales and calibrated nothing."
    assert f"Quantized by {writer}; {words}" in (out / "README.md").read_text()
    assert {path.name for path in (out / "s2q").iterdir()} == {"convert.json", "manifest.json"}
    for component in ("vae", "text_encoder"):
        for path in (folder / component).glob("*.safetensors"):
            assert path.read_bytes() == (out / component / path.name).read_bytes()


def test_a_model_whose_writer_is_not_known_is_that_of_its_tool(sdnq, tmp_path, capsys):
    folder = sdnq((CONVROT,))
    (folder / EXPORT_RECORD).unlink()
    s2q.convert(folder, out=tmp_path / "out")
    assert "\nQuantized by sdnq 0.2.8; `s2q convert` kept" in (tmp_path / "out/README.md").read_text()
    assert run(["inspect", str(tmp_path / "out")]) == 0
    assert "converted from sdnq 0.2.8\n" in capsys.readouterr().out


def test_the_writer_of_a_file_is_a_line(made, comfyui, tmp_path):
    file = comfyui(CONVROT, metadata={"quantized_by": "a tool\n\n# Title \x1b[31m"})
    report = s2q.convert(file, out=tmp_path / "out", base=made("wan", CONVROT))
    assert report.writer == r"a tool # Title \x1b[31m"
    assert rf"Quantized by {report.writer};" in (tmp_path / "out/README.md").read_text()


def test_the_card_has_the_task_of_the_pipeline(sdnq, tmp_path):
    folder = sdnq((CONVROT,))
    for pipeline, task in (("CogVideoXPipeline", "text"), ("CogVideoXImageToVideoPipeline", "image")):
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": pipeline}))
        (folder / "README.md").unlink(missing_ok=True)
        s2q.convert(folder, out=tmp_path / "out", overwrite=True)
        assert read_card(tmp_path / "out")["pipeline_tag"] == f"{task}-to-video"


def test_the_source_of_a_conversion_is_the_full_precision_model(sdnq, made, tmp_path):
    folder = sdnq((CONVROT,))
    place = embedded_folder("shapes-cogvideox") / "transformer"
    path = folder / "transformer/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_name_or_path": str(place)}))
    assert s2q.convert(folder, out=tmp_path / "out").source == "shapes-cogvideox"
    assert generation_defaults(str(tmp_path / "out")) == generation_defaults("shapes-cogvideox")
    assert str(place) not in (tmp_path / "out/transformer/config.json").read_text()
    base = made("cogvideox", CONVROT)
    assert s2q.convert(folder, out=tmp_path / "out", base=base, overwrite=True).source == base.name


def test_a_converted_checkpoint_gives_the_videos_of_the_one_that_was_exported(sdnq, made, tmp_path):
    s2q.convert(sdnq((CONVROT,)), out=tmp_path / "out")
    call = {name: value for name, value in TINY_CALL.items() if name != "max_sequence_length"}
    ours, theirs = (
        s2q.generate(path, prompts=["a"], **call)[0] for path in (tmp_path / "out", made("cogvideox", CONVROT))
    )
    assert torch.equal(ours.latents, theirs.latents)


def test_an_output_is_replaced_with_overwrite_only(sdnq, tmp_path, capsys):
    folder, out = sdnq((CONVROT,)), tmp_path / "out"
    arguments = ["convert", str(folder), "-o", str(out)]
    assert run(arguments) == 0
    before = (out / "s2q/manifest.json").stat().st_mtime_ns
    assert run(arguments) == 3
    assert "exists; pass --overwrite" in capsys.readouterr().err
    assert (out / "s2q/manifest.json").stat().st_mtime_ns == before
    assert run([*arguments, "--overwrite"]) == 0
    assert verify_manifest(out) == []
    assert_refused("is inside of", folder, folder / "out")


def test_scales_that_bf16_would_round_are_kept_in_fp32(sdnq, tmp_path):
    folder = sdnq((CONVROT,), tensors=lambda stored: stored[f"{LINEAR}.scale"].mul_(1.001))
    s2q.convert(folder, out=tmp_path / "out")
    config = read_config(tmp_path / "out")
    assert (config.format_version, config.wide) == (3, True)
    scale = packed_linears(tmp_path / "out")[1][LINEAR].weight_scale
    assert torch.equal(scale, load_file(folder / WEIGHTS)[f"{LINEAR}.scale"].flatten())
    assert verify_manifest(tmp_path / "out") == []


def test_a_branch_is_rounded_to_bf16_and_the_difference_is_told(sdnq, tmp_path):
    folder = sdnq((CONVROT, *BRANCH), tensors=lambda stored: stored[f"{LINEAR}.svd_down"].mul_(1.01))
    report = s2q.convert(folder, out=tmp_path / "out")
    assert 1e-6 < report.largest_difference < 2**-8
    assert report.rounding == "branches are rounded to bf16"
    assert read_config(tmp_path / "out").format_version == 3


def test_sylvesters_rotation_is_stored(sdnq, tmp_path):
    """As SDNQ's own quantizer takes it for a width like 1920: the largest power of 2, no power of 4."""
    folder = sdnq(("rtn-w4a8",), config=lambda config: config.update(use_hadamard=True, hadamard_group_size=32))
    s2q.convert(folder, out=tmp_path / "out")
    layer = packed_linears(tmp_path / "out")[1][LINEAR]
    matrix, step = torch.ones(1, 1), torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    for _ in range(5):
        matrix = torch.kron(matrix, step)
    matrix = matrix / 32**0.5
    torch.testing.assert_close(layer.transform_right, matrix, rtol=1e-7, atol=0)
    rotated = layer.dequantized_weight().unflatten(1, (-1, 32)) @ matrix
    torch.testing.assert_close(layer.effective_weight(torch.float32), rotated.flatten(1), rtol=0, atol=1e-6)


def test_a_scale_of_a_whole_weight_is_that_of_every_row_and_zeros_get_one(sdnq, tmp_path):
    name = LINEAR.replace("to_q", "to_k")

    def change(stored):
        stored[f"{LINEAR}.scale"] = torch.full((1, 1), 0.5)
        stored[f"{name}.scale"][3] = 0

    s2q.convert(sdnq((CONVROT,), tensors=change), out=tmp_path / "out")
    layers = packed_linears(tmp_path / "out")[1]
    assert layers[LINEAR].weight_scale.tolist() == [0.5] * layers[LINEAR].out_features
    assert (layers[name].weight_scale[3], layers[name].codes()[3].abs().max()) == (1, 0)


def test_linears_that_see_few_rows_are_weight_only(sdnq, tmp_path):
    """SDNQ computes calls with fewer than 32 rows so, whatever the configuration says; adaLN linears have no others."""

    def everywhere(config):
        for options in config["modules_quant_config"].values():
            options["use_quantized_matmul"] = True

    s2q.convert(sdnq((CONVROT,), config=everywhere), out=tmp_path / "out")
    schemes = read_config(tmp_path / "out").layers
    assert {scheme for name, scheme in schemes.items() if "norm" in name} == {"w4a16"}
    assert {scheme for name, scheme in schemes.items() if "norm" not in name} == {"w4a8"}


def test_groups_beside_int8_products_stay_groups(sdnq, tmp_path):
    folder = sdnq(("rtn-w4a16", *GROUPS), config=lambda config: config.update(use_quantized_matmul=True))
    report = s2q.convert(folder, out=tmp_path / "out")
    assert report.recipe == "sdnq-w4a8"
    assert report.linears == {"w4g32a8": 12, "w4a16": 4}
    assert report.largest_difference == 0


@pytest.mark.parametrize(
    ("config", "tensors", "words"),
    [
        ({}, {"zero_point": torch.zeros(64, 1)}, "int4 weights and zero points"),
        ({"weights_dtype": "uint4"}, {}, "uint4 weights"),
        ({"weights_dtype": "float8_e4m3fn"}, {}, "float8_e4m3fn weights"),
        ({"use_codebook": True}, {}, "codebooks"),
        ({}, {"scale_2": torch.ones(1)}, r"scales that are quantized themselves \(scale_2\)"),
        ({"quantized_matmul_dtype": "float8_e4m3fn"}, {}, "activations in float8_e4m3fn"),
        ({}, {"scale": torch.ones(64, 3)}, r"scales of shape \[64, 3\]"),
        ({}, {"scale": torch.ones(64, 3, 1)}, r"scales of shape \[64, 3, 1\]"),
        ({}, {"scale": torch.full((64, 1), -1.0)}, "weight_scale contains scales that are not positive"),
        ({}, {"svd_down": torch.ones(64, 2), "scale": None}, "damaged tensors or options"),
        ({}, {"weight": torch.zeros(7, dtype=torch.uint8)}, r"weight torch.uint8 \[7\], not \[2048\]"),
        ({}, {"svd_down": torch.ones(64, 2)}, r"svd_up torch.uint8 \[0\], not \[2, 64\]"),
        ({"hadamard_group_size": "wide"}, {}, "damaged tensors or options"),
    ],
)
def test_what_does_not_fit_of_sdnq_is_refused_with_the_linear_and_a_remedy(sdnq, config, tensors, words, tmp_path):
    def change(stored):
        for part, tensor in tensors.items():
            stored.pop(f"{LINEAR}.{part}", None)
            if tensor is not None:
                stored[f"{LINEAR}.{part}"] = tensor

    folder = sdnq((CONVROT,), config=lambda content: content.update(config), tensors=change)
    assert_refused(
        rf"^{LINEAR if tensors else r'transformer_blocks.0.attn1.to_k'}: is stored with {words}.*; expected symmetric "
        "integer codes in rows or groups; quantize tiny with s2q quantize, or with weights_dtype int4 or int8 and no "
        "codebook in sdnq$",
        folder,
        tmp_path / "out",
    )


def test_tensors_of_another_model_are_refused(sdnq, tmp_path):
    folder = sdnq((CONVROT,), tensors=lambda stored: stored.pop("proj_out.bias"))
    assert_refused(
        r"sdnq: proj_out.bias is missing; check --base, or download the model again", folder, tmp_path / "out"
    )


def test_codes_of_other_modules_are_refused(sdnq, tmp_path):
    folder = sdnq((CONVROT,), tensors=lambda stored: stored.update({"patch_embed.proj.scale": torch.ones(1)}))
    assert_refused("patch_embed.proj: is stored with codes of Conv2d", folder, tmp_path / "out")


def test_quantized_text_encoders_come_from_a_base(sdnq, made, tmp_path):
    folder = sdnq((CONVROT,))
    path = folder / "text_encoder/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "sdnq"}}))
    assert_refused(
        "its text_encoder is quantized by sdnq, which is not read; pass --base MODEL", folder, tmp_path / "out"
    )
    s2q.convert(folder, out=tmp_path / "out", base=made("cogvideox", CONVROT))
    assert "quantization_config" not in json.loads((tmp_path / "out/text_encoder/config.json").read_text())


def test_a_base_of_another_family_is_refused(made, comfyui, sdnq, tmp_path):
    base = made("wan", CONVROT)
    words = (
        "its transformer is WanTransformer3DModel, that of .* is CogVideoXTransformer3DModel; pass the pipeline that"
    )
    assert_refused(words, sdnq((CONVROT,)), tmp_path / "out", base=base)
    file = comfyui(CONVROT)
    assert_refused(
        "does not know the original names of CogVideoX", file, tmp_path / "out", base=made("cogvideox", CONVROT)
    )
    assert_refused("has two transformers, a file", file, tmp_path / "out", base=made("wan 2.2 a14b", CONVROT))
    other = made("wan", "convrot-w8a8")
    config = json.loads((other / "transformer/config.json").read_text())
    shutil.copytree(other, tmp_path / "wide")
    (tmp_path / "wide" / MANIFEST).unlink()
    (tmp_path / "wide/transformer/config.json").write_text(json.dumps(config | {"out_channels": 32}))
    words = r"proj_out.(bias|weight): got \[.*\], expected \[.*\]; check --base"
    assert_refused(words, file, tmp_path / "out", base=tmp_path / "wide")
    (tmp_path / "wide/transformer/config.json").write_text(json.dumps(config | {"num_layers": 1}))
    assert_refused(r"blocks.1.* is marked as quantized, but Wan", file, tmp_path / "out", base=tmp_path / "wide")


def test_marks_may_be_in_the_header_and_names_may_have_a_prefix(made, comfyui, tmp_path):
    marks = {}

    def change(stored):
        for name in [name for name in stored if name.endswith(".comfy_quant")]:
            text = bytes(stored.pop(name).tolist()).decode()
            marks["model.diffusion_model." + name.removesuffix(".comfy_quant")] = json.loads(text)
        for name in list(stored):
            stored[f"model.diffusion_model.{name}"] = stored.pop(name)

    file = comfyui(CONVROT, tensors=change)
    save_file(load_file(file), file, metadata={"_quantization_metadata": json.dumps({"layers": marks})})
    report = s2q.convert(file, out=tmp_path / "out", base=made("wan", CONVROT))
    assert_equal_linears(tmp_path / "out", made("wan", CONVROT))
    assert report.writer is None


def test_a_file_may_have_one_scale_for_a_weight_and_int8_products_of_4_bit_codes(made, comfyui, tmp_path):
    def change(stored):
        mark = {"format": "convrot_w4a4", "convrot_groupsize": 64, "linear_dtype": "int8"}
        stored[f"{FILE_LINEAR}.comfy_quant"] = torch.tensor(list(json.dumps(mark).encode()), dtype=torch.uint8)
        stored[f"{FILE_LINEAR}.weight_scale"] = torch.tensor(0.25)

    recipe = ("convrot-w4a4", "skip=['*.ffn.net.2']")
    s2q.convert(comfyui(*recipe, tensors=change), out=tmp_path / "out", base=made("wan", *recipe))
    layer, theirs = (
        packed_linears(path)[1]["blocks.0.attn1.to_q"] for path in (tmp_path / "out", made("wan", *recipe))
    )
    assert torch.equal(layer.codes(), theirs.codes())
    assert layer.scheme.name == "w4a8"
    assert layer.weight_scale.tolist() == [0.25] * layer.out_features


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"weight_codebook": torch.zeros(16)},
            "weight_codebook, which asym_w4a8_int8 has with groups",
        ),
        ({"weight_s_rel": torch.full((64, 1), 2.0)}, "to_q: is stored with relative scales of groups of 64 of 64 chan"),
        ({"weight_s_rel": torch.ones(64, 4)}, r"relative scales of shape \[64, 4\] for groups of 64 of 64 channels"),
        (IN_GROUPS, "to_q: is stored with groups of 16 whose weight_codebook is missing"),
        (IN_GROUPS | {"weight_codebook": BOOK * 2}, "groups of 16 whose weight_codebook is another"),
        (
            IN_GROUPS | {"weight_codebook": BOOK, "weight_s_rel": torch.full((64, 4), 17.0)},
            "groups other than",
        ),
        (
            IN_GROUPS | {"weight_codebook": BOOK, "weight_s_rel": torch.full((64, 4), -1.0)},
            "groups other than",
        ),
        (IN_GROUPS | {"weight_s_rel": torch.ones(64, 4, dtype=torch.int32)}, "relative scales in torch.int32"),
        (IN_GROUPS | {"weight_s_rel": torch.ones(64, 0)}, r"relative scales of shape \[64, 0\]"),
        (GROUPS_OF_2, "relative scales of groups of 2 of 64 channels"),
        ({"weight_scale": torch.ones(64)}, "to_q: is stored with weight_scale, which asym_w4a8_int8 does not have"),
        ({"weight_s_rel": None}, "relative scales of shape None"),
        ({"weight": torch.zeros(64, 48, dtype=torch.int8)}, r"asym_w4a8_int8 weights torch.int8 \[64, 48\]"),
        ({"weight_s_channel": None}, "asym_w4a8_int8 scales of shape None"),
        ({"comfy_quant": {"format": "float8_e4m3fn"}}, "to_q: is stored with format 'float8_e4m3fn'"),
        ({"comfy_quant": {"format": "asym_w4a8_int8", "convrot_groupsize": 32}}, "a rotation in blocks of 32 of 64"),
        ({"comfy_quant": {"format": "asym_w4a8_int8"}}, "a rotation in blocks of 256 of 64"),
        ({"comfy_quant": [1]}, "has no linears with comfy_quant or _quantization_metadata"),
    ],
)
def test_what_does_not_fit_of_comfyui_is_refused(made, comfyui, change, words, tmp_path):
    def edit(stored):
        for part, value in change.items():
            stored.pop(f"{FILE_LINEAR}.{part}", None)
            if part == "comfy_quant":
                stored[f"{FILE_LINEAR}.{part}"] = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
            elif value is not None:
                stored[f"{FILE_LINEAR}.{part}"] = value

    assert_refused(words, comfyui(CONVROT, tensors=edit), tmp_path / "out", base=made("wan", CONVROT))


def test_groups_need_their_codebook_where_marks_are_in_the_header(made, comfyui, tmp_path):
    """Uniform codes in groups have whole scales too, often, and are not those of a table."""
    marks = {}

    def change(stored):
        for name in [name for name in stored if name.endswith(".comfy_quant")]:
            marks[name.removesuffix(".comfy_quant")] = json.loads(bytes(stored.pop(name).tolist()))
        for name in [name for name in stored if name.endswith(".weight_codebook")]:
            del stored[name]

    file = comfyui(CONVROT, *TABLE, tensors=change)
    save_file(load_file(file), file, metadata={"_quantization_metadata": json.dumps({"layers": marks})})
    assert_refused("whose weight_codebook is missing", file, tmp_path / "out", base=made("wan", CONVROT, *TABLE))


def test_a_codebook_of_another_component_is_not_read(made, comfyui, tmp_path):
    def change(stored):
        for name in list(stored):
            stored[f"model.diffusion_model.{name}"] = stored.pop(name)
        stored["text_encoders.x.weight_codebook"] = torch.zeros(16)

    checkpoint = made("wan", CONVROT, *TABLE)
    s2q.convert(comfyui(CONVROT, *TABLE, tensors=change), out=tmp_path / "out", base=checkpoint)
    assert_equal_linears(tmp_path / "out", checkpoint)


def test_a_row_of_zeros_stays_one(made, comfyui, tmp_path):
    def change(stored):
        stored[f"{FILE_LINEAR}.weight_s_channel"][3] = 0

    s2q.convert(comfyui(CONVROT, *TABLE, tensors=change), out=tmp_path / "out", base=made("wan", CONVROT))
    layer = packed_linears(tmp_path / "out")[1]["blocks.0.attn1.to_q"]
    assert not bool(layer.dequantized_weight()[3].any())
    assert bool(layer.dequantized_weight()[2].any())


def test_a_mark_that_is_no_text_is_refused(made, comfyui, tmp_path):
    def change(stored):
        stored[f"{FILE_LINEAR}.comfy_quant"] = torch.tensor([255, 254], dtype=torch.uint8)

    file = comfyui(CONVROT, tensors=change)
    assert_refused("its marks of quantized linears are damaged", file, tmp_path / "out", base=made("wan", CONVROT))


@pytest.mark.slow
def test_pieces_of_a_fused_linear_come_back(tmp_path):
    pipe = tiny_pipeline("hunyuanvideo")
    torch.manual_seed(0)  # of the published width, which the original layout needs
    sizes = {"num_layers": 1, "num_single_layers": 0, "num_refiner_layers": 1, "mlp_ratio": 0.25}
    pipe.register_modules(transformer=HunyuanVideoTransformer3DModel(text_embed_dim=256, **sizes).bfloat16().eval())
    pipe.save_pretrained(tmp_path / "model")
    s2q.quantize(tmp_path / "model", recipe=CONVROT, out=tmp_path / "made", overrides=[*TABLE, "modulation=null"])
    s2q.export(tmp_path / "made", to="comfyui", out=tmp_path / "file.safetensors")
    s2q.convert(tmp_path / "file.safetensors", out=tmp_path / "out", base=tmp_path / "model")
    assert_equal_linears(tmp_path / "out", tmp_path / "made")


def test_pieces_of_a_fused_linear_get_memory_of_their_own():
    whole = torch.arange(6.0)
    pieces = apart({"q": whole[:2], "k": whole[2:4], "all": whole})
    assert [tensor.untyped_storage().nbytes() for tensor in pieces.values()] == [8, 8, 24]
    assert [tensor.tolist() for tensor in pieces.values()] == [[0, 1], [2, 3], whole.tolist()]


def test_a_file_needs_a_base_and_marks(made, comfyui, tmp_path, capsys):
    file = comfyui(CONVROT)
    with pytest.raises(UsageError, match=r"is one transformer; pass --base MODEL \(base=\)"):
        s2q.convert(file, out=tmp_path / "out")
    assert run(["convert", str(file), "-o", str(tmp_path / "out")]) == 2
    capsys.readouterr()
    plain = made("wan", CONVROT) / WEIGHTS
    assert_refused("has no linears with comfy_quant", plain, tmp_path / "out", base=made("wan", CONVROT))
    (tmp_path / "short.safetensors").write_bytes(file.read_bytes()[:1000])
    assert_refused("truncated", tmp_path / "short.safetensors", tmp_path / "out", base=made("wan", CONVROT))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert_refused(
        "model.gguf: is not read; expected a pipeline folder of sdnq", tmp_path / "model.gguf", tmp_path / "out"
    )


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao", "gguf", "quanto"])
def test_other_methods_are_refused_with_the_full_precision_model(sdnq, method, tmp_path):
    folder = sdnq((CONVROT,), config=lambda config: config.update(quant_method=method))
    words = f"its transformer is quantized by {method}, which is not read; .*; quantize {{}} with s2q quantize"
    (folder / "README.md").write_text("---\nbase_model: acme/wan\n---\n")
    assert_refused(words.format("acme/wan"), folder, tmp_path / "out")
    (folder / "README.md").unlink()
    assert_refused(words.format("the model that it was made from"), folder, tmp_path / "out")


def test_models_that_need_no_conversion_are_refused(made, tiny_model, tmp_path):
    assert_refused("is an s2q checkpoint already", made("cogvideox", CONVROT), tmp_path / "out")
    assert_refused("is not quantized; quantize it with s2q quantize", tiny_model, tmp_path / "out")


def test_a_conversion_that_differs_is_discarded(sdnq, tmp_path, monkeypatch):
    folder = sdnq((CONVROT,))
    monkeypatch.setattr(module, "decoded", lambda weight, form: weight.codes.float())
    with pytest.raises(
        S2QError, match=r"differs by .* from s2q's decoding of the sdnq tensors, expected at most 1.0e-05; nothing"
    ):
        s2q.convert(folder, out=tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(module, "read_tensors", lambda folder: {})
    with pytest.raises(S2QError, match=r"^\S+: in the written file or in the checkpoint alone; nothing was converted"):
        s2q.convert(folder, out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["sdnq"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "int4"),
        ({"modules_quant_config": {".blocks.1.": {"weights_dtype": "int8"}}}, "int8"),
        ({"modules_quant_config": {".blocks.0.": {"weights_dtype": "int8"}}}, "int4"),
        ({"modules_quant_config": {"to_q": {"weights_dtype": "int8"}}}, "int8"),
        ({"modules_quant_config": {"blocks.*.to_q": {"weights_dtype": "int8"}}}, "int8"),
        ({"modules_quant_config": {"to": {"weights_dtype": "int8"}}}, "int4"),
        ({"modules_dtype_dict": {"int8": ["blocks.1.to_q.weight"]}}, "int8"),
        ({"modules_dtype_dict": {"minimum_6bit": ["to_q"]}}, "int6"),
        ({"modules_dtype_dict": {"minimum_uint6": ["to_q"]}}, "uint6"),
        ({"modules_dtype_dict": {"minimum_3bit": ["to_q"]}}, "int4"),
    ],
)
def test_options_of_a_linear(config, expected):
    assert linear_options({"weights_dtype": "int4", **config}, "blocks.1.to_q")["weights_dtype"] == expected


def test_a_linear_may_be_kept_from_int8_products():
    config = {"weights_dtype": "int4", "use_quantized_matmul": True, "modules_to_not_use_matmul": ["to_q"]}
    assert not linear_options(config, "blocks.1.to_q")["use_quantized_matmul"]
    assert linear_options(config, "blocks.1.to_k")["use_quantized_matmul"]


@pytest.mark.parametrize(
    ("layout", "options", "mark", "scheme"),
    [
        ("TensorWiseINT8Layout", {"per_channel": True, "convrot": True}, {"format": "int8_tensorwise"}, "w8a8"),
        ("TensorWiseINT8Layout", {}, {"format": "int8_tensorwise"}, "w8a8"),
        ("TensorCoreConvRotW4A4Layout", {}, {"format": "convrot_w4a4"}, "w4a4"),
        ("TensorCoreConvRotW4A4Layout", {"linear_dtype": "int8"}, {"format": "convrot_w4a4"}, "w4a8"),
    ],
    ids=["int8 rotated", "int8", "w4a4", "w4a8"],
)
def test_what_comfy_kitchen_quantizes_computes_the_same(made, comfyui, layout, options, mark, scheme, tmp_path):
    kitchen = pytest.importorskip("comfy_kitchen.tensor")
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    rotates = layout.endswith("W4A4Layout") or "convrot" in options
    quantized = kitchen.QuantizedTensor.from_float(weight, layout, convrot_groupsize=64, **options)
    mark = mark | {name: value for name, value in options.items() if name != "per_channel"}
    if rotates:
        mark["convrot_groupsize"] = 64

    def change(stored):
        for name in [name for name in stored if name.startswith(f"{FILE_LINEAR}.weight")]:
            del stored[name]
        stored.update(quantized.state_dict(f"{FILE_LINEAR}.weight"))
        stored[f"{FILE_LINEAR}.comfy_quant"] = torch.tensor(list(json.dumps(mark).encode()), dtype=torch.uint8)

    s2q.convert(comfyui(CONVROT, tensors=change), out=tmp_path / "out", base=made("wan", CONVROT))
    layer = packed_linears(tmp_path / "out")[1]["blocks.0.attn1.to_q"]
    assert layer.scheme.name == scheme
    expected = quantized.dequantize()
    torch.testing.assert_close(
        layer.effective_weight(torch.float32), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
    )
    if scheme != "w4a8":  # whose eager linear computes with 4 bits
        x = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
        output = torch.nn.functional.linear(x, quantized, layer.bias)
        assert float((layer(x) - output).abs().max() / output.abs().max()) < 5e-6
