"""Damaged checkpoints: each is refused with one clear line that names the file or the tensor."""

import json
import shutil

import pytest
import torch
from diffusers import CogVideoXDPMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file

from s2q.checkpoint import inspect_checkpoint, load_pipeline, verify_manifest, write_manifest
from s2q.common.errors import InvalidInputError

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
LAYER = "transformer_blocks.1.ff.net.2"


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_manifest(folder)  # as whoever gives the file to others can


def edit_config(folder, change):
    path = folder / "transformer/config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))
    write_manifest(folder)


def load(folder):
    return CogVideoXTransformer3DModel.from_pretrained(folder, subfolder="transformer")


def refused(folder, match, doors=(load, CogVideoXPipeline.from_pretrained)):
    for door in doors:
        with pytest.raises(InvalidInputError, match=match) as caught:
            door(folder)
        assert "\n" not in str(caught.value)


def flip_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", [WEIGHTS, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "model_index.json"]
)
def test_one_flipped_bit_anywhere_names_the_file(copy, name):
    flip_bit(copy / name, (copy / name).stat().st_size * 2 // 3)
    with pytest.raises(InvalidInputError, match=f"{name}: its SHA-256 differs"):
        load_pipeline(copy)
    assert verify_manifest(copy) == [f"{name}: its SHA-256 differs from the manifest; altered"]


def test_truncation_names_the_file(copy):
    (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(InvalidInputError, match=rf"{WEIGHTS}: got \d+ bytes, expected \d+ of the manifest; truncated"):
        load_pipeline(copy)
    with pytest.raises(InvalidInputError, match=rf"{WEIGHTS}: truncated"):
        inspect_checkpoint(copy)
    report = inspect_checkpoint(copy, verify=True)
    assert report.verified is False
    assert len(report.problems) == 1


def test_missing_and_added_files_are_named(copy):
    (copy / "vae/config.json").unlink()
    shutil.copy(copy / WEIGHTS, copy / "transformer/other.safetensors")
    assert verify_manifest(copy) == [
        "transformer/other.safetensors: not in the manifest; added later",
        "vae/config.json: missing",
    ]


def test_the_model_card_may_be_edited_and_hidden_files_added(copy):
    (copy / "README.md").write_text("mine now")
    (copy / ".gitattributes").write_text("* text")
    assert verify_manifest(copy) == [
        "README.md: got 8 bytes, expected " + str(_listed(copy)) + " of the manifest; truncated or altered"
    ]
    load_pipeline(copy)


def _listed(folder):
    return json.loads((folder / "s2q/manifest.json").read_text())["files"]["README.md"]["bytes"]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"schema_version": 1}', '{"schema_version": 1, "files": {"a": 3}}']
)
def test_a_damaged_manifest_is_refused(copy, content):
    (copy / "s2q/manifest.json").write_text(content)
    with pytest.raises(InvalidInputError, match=r"manifest\.json: (damaged|cannot be read as JSON|got a JSON list)"):
        load_pipeline(copy)


def test_a_manifest_of_another_version_is_refused(copy):
    (copy / "s2q/manifest.json").write_text('{"schema_version": 9, "files": {}}')
    with pytest.raises(InvalidInputError, match="schema_version=9; expected 1"):
        load_pipeline(copy)


@pytest.fixture
def saved_again(copy, tmp_path):
    """A checkpoint that diffusers has loaded, given another scheduler and saved: it has no s2q folder."""
    pipe = CogVideoXPipeline.from_pretrained(copy, dtype=torch.bfloat16)
    pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "again")
    return tmp_path / "again"


def test_without_a_manifest_a_load_warns_unless_one_is_required(saved_again, caplog):
    with pytest.raises(InvalidInputError, match=r"has no s2q/manifest\.json, so it cannot be verified; .*diffusers"):
        load_pipeline(saved_again, verify=True)
    load_pipeline(saved_again, verify=False)
    assert not caplog.records
    assert type(load_pipeline(saved_again).scheduler) is CogVideoXDPMScheduler
    load_pipeline(saved_again)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "has no s2q/manifest.json, as diffusers saves it, so its files are not verified" in record.message


def test_an_inspection_verifies_only_what_has_a_manifest(saved_again, copy):
    assert inspect_checkpoint(saved_again).layers == inspect_checkpoint(copy).layers
    with pytest.raises(InvalidInputError, match=r"has no s2q/manifest\.json, so it cannot be verified"):
        inspect_checkpoint(saved_again, verify=True)


@pytest.mark.parametrize("verify", [None, True])
def test_damage_is_refused_whether_or_not_a_manifest_is_required(copy, verify):
    flip_bit(copy / WEIGHTS, -9)
    with pytest.raises(InvalidInputError, match=f"{WEIGHTS}: its SHA-256 differs .*--no-verify"):
        load_pipeline(copy, verify=verify)
    load_pipeline(copy, verify=False)


def test_a_checkpoint_saved_again_with_a_variant(copy, tmp_path):
    CogVideoXPipeline.from_pretrained(copy, dtype=torch.bfloat16).save_pretrained(tmp_path / "again", variant="mine")
    assert inspect_checkpoint(tmp_path / "again", variant="mine").layers == inspect_checkpoint(copy).layers
    loaded = load_pipeline(tmp_path / "again", variant="mine").transformer.state_dict()
    assert loaded.keys() == load_pipeline(copy).transformer.state_dict().keys()
    with pytest.raises(InvalidInputError, match="has only weights of variant mine; pass --variant mine"):
        inspect_checkpoint(tmp_path / "again")


@pytest.mark.parametrize("version", [0, 5, "1", None, True])
def test_an_unknown_format_version_is_refused(copy, version):
    edit_config(copy, lambda config: config.update(format_version=version))
    refused(copy, f"format_version={version!r}; this s2q reads versions 1 to 4")
    with pytest.raises(InvalidInputError, match="format_version"):
        load_pipeline(copy, verify=False)
    with pytest.raises(InvalidInputError, match="format_version"):
        inspect_checkpoint(copy)


def test_unknown_key_in_the_configuration(copy):
    edit_config(copy, lambda config: config.update(layer={}))
    refused(copy, "unknown key in quantization_config 'layer': nearest names are layers")


def test_an_unknown_compute_dtype_is_refused(copy):
    edit_config(copy, lambda config: config.update(compute_dtype="int8"))
    refused(copy, "unknown compute_dtype in quantization_config 'int8'")


def test_layer_with_an_unknown_scheme(copy):
    edit_config(copy, lambda config: config["layers"].update({LAYER: "w5a6"}))
    refused(copy, f"unknown scheme of {LAYER} in quantization_config 'w5a6'")


def test_layer_that_the_model_does_not_have(copy):
    edit_config(copy, lambda config: config["layers"].update({"transformer_blocks.7.attn1.to_q": "w4a6"}))
    refused(copy, r"transformer_blocks\.7\.attn1\.to_q is in quantization_config, but CogVideoX\w+ has no such linear")


def test_packed_layer_that_the_configuration_does_not_know(copy):
    edit_config(copy, lambda config: config["layers"].pop(LAYER))
    refused(copy, f"{LAYER} is packed in the file but not in quantization_config")


@pytest.mark.parametrize("field", ["layers", "schemes"])
def test_configuration_without_layers_or_schemes(copy, field):
    edit_config(copy, lambda config: config.pop(field))
    refused(copy, "layers or schemes is missing")


def test_otherquantization_methods_are_not_ours(copy):
    edit_config(copy, lambda config: config.update(quant_method="bitsandbytes"))
    with pytest.raises(InvalidInputError, match="is not an s2q checkpoint: quant_method is 'bitsandbytes'"):
        load_pipeline(copy)


def test_wrong_width_of_packed_data(copy):
    def narrow(tensors):
        tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"][:, :-1].contiguous()

    edit_tensors(copy, narrow)
    refused(copy, rf"{LAYER}\.weight: got shape \[64, 127\], expected \[64, 128\] for w4a6")
    with pytest.raises(InvalidInputError, match=rf"{LAYER}\.weight: got U8 \[64, 127\], expected U8 \[64, 128\]"):
        inspect_checkpoint(copy)


def test_a_wrong_number_of_scales_is_refused(copy):
    def shorten(tensors):
        tensors[f"{LAYER}.weight_scale"] = tensors[f"{LAYER}.weight_scale"][:-1].contiguous()

    edit_tensors(copy, shorten)
    refused(copy, rf"{LAYER}\.weight_scale: got shape \[63\], expected \[64\]")


@pytest.mark.parametrize("tensor", ["weight", "weight_scale"])
def test_a_tensor_of_another_dtype_is_refused(copy, tensor):
    def cast(tensors):
        tensors[f"{LAYER}.{tensor}"] = tensors[f"{LAYER}.{tensor}"].to(torch.float16)

    edit_tensors(copy, cast)
    refused(copy, rf"{LAYER}\.{tensor}: got dtype torch\.float16, expected torch\.")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_scales_that_are_not_positive_numbers(copy, value):
    edit_tensors(copy, lambda tensors: tensors[f"{LAYER}.weight_scale"][3:4].fill_(value))
    refused(copy, rf"{LAYER}\.weight_scale: contains scales that are not positive and finite")


@pytest.mark.parametrize("name", [f"{LAYER}.weight", f"{LAYER}.weight_scale", f"{LAYER}.bias", "proj_out.weight"])
def test_a_missing_tensor_is_refused(copy, name):
    edit_tensors(copy, lambda tensors: tensors.pop(name))
    refused(copy, f"checkpoint lacks 1 tensor, {name}")


def test_a_shard_that_lacks_what_the_index_promises(checkpoint, tmp_path):
    load(checkpoint).save_pretrained(tmp_path, max_shard_size="16KB")
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    shard = tmp_path / index["weight_map"][f"{LAYER}.weight"]
    tensors = load_file(shard)
    tensors.pop(f"{LAYER}.weight")
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(InvalidInputError, match=rf"lacks 1 tensor, {LAYER}\.weight"):
        CogVideoXTransformer3DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_a_damaged_transformer_config_is_refused(copy, content):
    (copy / "transformer/config.json").write_text(content)
    with pytest.raises(InvalidInputError, match=r"transformer/config\.json"):
        inspect_checkpoint(copy)


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(InvalidInputError, match=r"is not an s2q checkpoint: it has no transformer/config\.json"):
        inspect_checkpoint(tmp_path)


def test_a_full_precision_folder_is_no_checkpoint(teacher, tmp_path):
    teacher.save_pretrained(tmp_path)
    with pytest.raises(InvalidInputError, match="is not an s2q checkpoint: quant_method is None"):
        load_pipeline(tmp_path)
