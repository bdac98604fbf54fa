"""With a manifest rebuilt to fit, what tensors and configurations must be is checked, before anything is allocated."""

import json
import math
import re
import resource
import time

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file

import s2q
from s2q.checkpoint import load_pipeline, write_manifest
from s2q.checkpoint.values import value_problem
from s2q.common.errors import InvalidInputError
from s2q.core.schemes import LinearScheme, PerChannel, QuantScheme

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
LAYER = "transformer_blocks.1.attn1.to_q"


def edit_tensors(folder, change, name=WEIGHTS):
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})
    write_manifest(folder)


def edit_config(folder, component="transformer", **changes):
    path = folder / component / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    write_manifest(folder)


def plain(folder):
    return CogVideoXTransformer3DModel.from_pretrained(folder, subfolder="transformer")


NOT_FINITE = "contains NaN or infinite values"


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("weight_scale", 1e38, r"contains scales up to 1\.0e\+38, with which a product overflows"),
        ("weight_scale", math.nan, "contains scales that are not positive and finite"),
        ("weight_scale", -1.0, "contains scales that are not positive and finite"),
        ("transform_scale", 0.0, "contains zeros, so the transform has no inverse"),
        ("transform_scale", math.nan, NOT_FINITE),
        ("transform_left", 0.0, "is a matrix without an inverse"),
        ("transform_right", 1.0, "is a matrix without an inverse"),
        ("transform_right", math.inf, NOT_FINITE),
        ("input_shift", math.nan, NOT_FINITE),
        ("low_rank_weight", math.inf, NOT_FINITE),
        ("activation_clip", 1.5, r"contains a ratio outside \(0, 1\]"),
        ("bias", math.nan, NOT_FINITE),
    ],
)
def test_values_that_a_tensor_cannot_have_are_refused_by_every_loader(copy, tensor, value, message):
    edit_tensors(copy, lambda tensors: tensors[f"{LAYER}.{tensor}"].fill_(value))
    for load in (s2q.load, plain, lambda folder: load_pipeline(folder, verify=False)):
        with pytest.raises(InvalidInputError, match=rf"{LAYER}\.{tensor}: {message}"):
            load(copy)


@pytest.mark.parametrize("name", ["text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"])
def test_values_of_other_components_are_finite(copy, name):
    def spoil(tensors):
        first = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
        tensors[first].view(-1)[0] = math.nan

    edit_tensors(copy, spoil, name)
    with pytest.raises(InvalidInputError, match=rf"{name.split('/')[0]}: .*{NOT_FINITE}"):
        s2q.load(copy)


@pytest.mark.parametrize("name", [WEIGHTS, "text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"])
def test_tensors_that_are_missing_left_over_or_of_another_shape_are_refused(copy, name):
    original = (copy / name).read_bytes()
    first = sorted(load_file(copy / name))[-1]
    component = name.split("/")[0]

    def transpose(tensors):
        tensors[first] = tensors[first][None].contiguous()

    changes = {
        "missing keys|lacks": lambda tensors: tensors.pop(first),
        "unexpected keys": lambda tensors: tensors.update(other=torch.zeros(3)),
        r"got shape .*, expected .* of config\.json": transpose,
        "got dtype I32, expected": lambda tensors: tensors.update({first: tensors[first].int()}),
    }
    for message, change in changes.items():
        (copy / name).write_bytes(original)
        edit_tensors(copy, change, name)
        with pytest.raises(InvalidInputError, match=rf"/{component}.*({message})"):
            s2q.load(copy)


@pytest.mark.parametrize(
    ("component", "changes"),
    [
        ("transformer", {"num_layers": 10**5}),
        ("transformer", {"num_layers": 10**9}),
        ("transformer", {"num_attention_heads": 10**9}),
        ("transformer", {"sample_width": 10**6, "sample_height": 10**6}),
        ("transformer", {"in_channels": -3}),
        ("transformer", {"patch_size": 0}),
        ("vae", {"layers_per_block": 10**6}),
        ("vae", {"latent_channels": 10**12}),
        ("text_encoder", {"num_layers": 10**6}),
        ("text_encoder", {"d_model": 10**8}),
        ("text_encoder", {"d_ff": -1}),
    ],
)
def test_sizes_are_compared_with_the_files_before_anything_is_allocated(copy, component, changes):
    edit_config(copy, component, **changes)
    began, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidInputError, match=rf"/{component}(/config\.json)?: "):
        s2q.load(copy)
    assert time.process_time() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 2**20  # KiB


def test_an_inspection_builds_no_larger_model_than_the_files_have(copy):
    edit_config(copy, num_layers=10**5)
    began = time.process_time()
    with pytest.raises(InvalidInputError, match=r"config\.json: describes a CogVideoX\w+ with more than"):
        s2q.inspect(copy)
    assert time.process_time() - began < 10


def test_the_compute_dtype_is_required(copy):
    config = json.loads((copy / "transformer/config.json").read_text())["quantization_config"]
    config.pop("compute_dtype")
    edit_config(copy, quantization_config=config)
    with pytest.raises(InvalidInputError, match="unknown compute_dtype in quantization_config"):
        s2q.load(copy)


def test_a_manifest_without_the_index_is_refused(copy):
    path = copy / "s2q/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["model_index.json"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(InvalidInputError, match=r"model_index\.json: not in the manifest"):
        s2q.load(copy)


def test_a_checkpoint_that_is_said_to_be_in_full_precision_is_noticed(copy):
    path = copy / "transformer/config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    with pytest.raises(InvalidInputError, match=r"transformer/config\.json: got .* of the manifest"):
        s2q.load(copy)
    with pytest.raises(InvalidInputError, match=r"/transformer: .*got (shape|dtype U8)"):
        s2q.load(copy, verify=False)


@pytest.mark.parametrize(("bytes_", "sha256"), [(-1, "0" * 64), (True, "0" * 64), (1.0, "0" * 64), (1, "0"), (1, None)])
def test_entries_of_a_manifest_are_sizes_and_hashes(copy, bytes_, sha256):
    path = copy / "s2q/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["vae/config.json"] = {"bytes": bytes_, "sha256": sha256}
    path.write_text(json.dumps(manifest))
    with pytest.raises(InvalidInputError, match=r"manifest\.json: damaged, not a manifest"):
        s2q.load(copy)


@pytest.mark.parametrize("name", ["../outside.json", "/etc/passwd", "vae/../../outside.json"])
def test_names_in_a_manifest_that_lead_out_are_missing_files(copy, name):
    path = copy / "s2q/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = {"bytes": 3, "sha256": "0" * 64}
    path.write_text(json.dumps(manifest))
    (copy.parent / "outside.json").write_text("{}\n")
    with pytest.raises(InvalidInputError, match=f"{name}: missing"):
        s2q.load(copy)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "config.json"])
def test_plain_from_pretrained_notices_an_altered_file_of_the_transformer(copy, name):
    path = copy / "transformer" / name
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    with pytest.raises((InvalidInputError, OSError), match=name):
        plain(copy)


def test_plain_from_pretrained_checks_nothing_without_a_manifest(copy):
    (copy / "s2q/manifest.json").unlink()
    plain(copy)


@pytest.mark.parametrize(
    ("num_bits", "byte", "message"),
    [
        (3, 0xFF, "contains codes .* expected -4 to 3 of 3 bits"),
        (2, 0x8B, "contains codes .* expected -2 to 1 of 2 bits"),
        (6, 0x20, "contains codes 32 to 32, expected -32 to 31 of 6 bits"),
        (5, 0xEF, "contains codes -17 to -17, expected -16 to 15 of 5 bits"),
        (3, 0x4B, None),
        (4, 0xFF, None),
        (8, 0x80, None),
        (6, 0xE0, None),
    ],
)
def test_codes_outside_of_their_bits_are_refused(num_bits, byte, message):
    scheme = LinearScheme(weight=QuantScheme(num_bits=num_bits, granularity=PerChannel()), activation=None)
    packed = torch.full((4, 8), byte, dtype=torch.uint8)
    problem = value_problem("weight", packed, scheme, in_features=16 if num_bits <= 4 else 8)
    assert (problem is None) if message is None else re.fullmatch(message, problem)


def test_padding_other_than_code_zero_is_refused():
    scheme = LinearScheme(weight=QuantScheme(num_bits=4, granularity=PerChannel()), activation=None)
    packed = torch.full((2, 3), 0x8F, dtype=torch.uint8)
    assert value_problem("weight", packed, scheme, in_features=5) is None
    packed[1, 2] = 0xFF
    assert "padded" in value_problem("weight", packed, scheme, in_features=5)
