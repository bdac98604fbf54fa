"""What a conversion checks: its output, its sources' files and values, and that nothing is replaced or lost."""

import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import s2q
from exported import BRANCH, CONVROT, LINEAR, WEIGHTS, assert_refused, packed_linears
from s2q.checkpoint import MANIFEST, verify_manifest
from s2q.common.cards import front_matter
from s2q.common.errors import InvalidInputError, S2QError
from s2q.exports import convert as module
from s2q.exports import reading
from s2q.generation.defaults import quantization_scheme
from s2q.models.quantized import full_precision_origin
from tiny import TINY_CALL


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_checkpoint_is_never_replaced_by_a_conversion_nor_a_conversion_by_a_checkpoint(
    sdnq, made, tiny_model, tmp_path
):
    calibrated = shutil.copytree(made("cogvideox", CONVROT), tmp_path / "calibrated")
    folder, before = sdnq((CONVROT,)), files_of(calibrated)
    with pytest.raises(InvalidInputError, match="was not written by this command; it is not replaced"):
        s2q.convert(folder, out=calibrated, overwrite=True)
    assert files_of(calibrated) == before
    s2q.convert(folder, out=tmp_path / "out")
    before = files_of(tmp_path / "out")
    with pytest.raises(InvalidInputError, match="was not written by this command; it is not replaced"):
        s2q.quantize(tiny_model, recipe="rtn-w4a8", out=tmp_path / "out", overwrite=True)
    assert files_of(tmp_path / "out") == before


@pytest.mark.parametrize(("name", "where"), [("base", "is"), ("base/sub", "is inside of"), (".", "contains")])
def test_an_output_is_apart_from_the_base(sdnq, made, name, where, tmp_path):
    base = shutil.copytree(made("cogvideox", CONVROT), tmp_path / "base")
    folder, before = sdnq((CONVROT,)), files_of(tmp_path)
    with pytest.raises(InvalidInputError, match=rf"{where} .*, from which it is made; choose a name outside"):
        s2q.convert(folder, base=base, out=tmp_path / name, overwrite=True)
    assert {path: content for path, content in files_of(tmp_path).items() if path in before} == before


@pytest.mark.parametrize("damaged", ["source", "base"])
def test_files_that_differ_from_their_manifest_are_refused(made, damaged, tmp_path):
    s2q.export(made("cogvideox", CONVROT), to="sdnq", out=tmp_path / "source")
    shutil.copytree(made("cogvideox", CONVROT), tmp_path / "base")
    vae = next((tmp_path / damaged / "vae").glob("*.safetensors"))
    content = bytearray(vae.read_bytes())
    content[-1] ^= 1
    vae.write_bytes(content)
    options = {"base": tmp_path / "base", "out": tmp_path / "out"}
    with pytest.raises(InvalidInputError, match=rf"{vae.name}: its SHA-256 differs from the manifest"):
        s2q.convert(tmp_path / "source", **options)
    s2q.convert(tmp_path / "source", **options, verify=False)


def test_verify_needs_a_manifest_of_the_source_only(sdnq, tiny_model, tmp_path, caplog):
    folder = sdnq((CONVROT,))
    with pytest.raises(InvalidInputError, match=r"has no s2q/manifest.json, so it cannot be verified"):
        s2q.convert(folder, out=tmp_path / "out", verify=True)
    s2q.convert(folder, base=tiny_model, out=tmp_path / "out")
    assert "manifest" not in caplog.text
    shutil.rmtree(folder)
    s2q.export(tmp_path / "out", to="sdnq", out=folder)
    s2q.convert(folder, base=tiny_model, out=tmp_path / "out", verify=True, overwrite=True)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (f"{LINEAR}.bias", lambda value: value * float("nan"), "contains NaN or infinite values"),
        ("norm_final.weight", lambda value: value / 0, "contains NaN or infinite values"),
        ("proj_out.weight", lambda value: value.to(torch.int8), "got torch.int8 without scales"),
        ("proj_out.weight", lambda value: value.to(torch.float8_e4m3fn), "got torch.float8_e4m3fn without scales"),
        (f"{LINEAR}.bias", lambda value: value.to(torch.float8_e4m3fn), "got torch.float8_e4m3fn without scales"),
        (f"{LINEAR}.bias", lambda value: value[:-1], r"got \[63\], expected \[64\]"),
    ],
)
def test_values_that_no_model_has_are_refused_with_file_and_tensor(sdnq, name, change, words, tmp_path):
    folder = sdnq((CONVROT,), tensors=lambda stored: stored.update({name: change(stored[name])}))
    assert_refused(rf"sdnq/{WEIGHTS}: {name}: {words}", folder, tmp_path / "out")


def test_the_dtype_is_that_of_the_unquantized_tensors(sdnq, tmp_path):
    def halve(stored):
        for name, tensor in stored.items():
            if tensor.is_floating_point() and not name.endswith("scale"):
                stored[name] = tensor.bfloat16()

    report = s2q.convert(sdnq((CONVROT,), tensors=halve), out=tmp_path / "out")
    assert report.dtype == "bfloat16"
    call = {name: value for name, value in TINY_CALL.items() if name != "max_sequence_length"}
    (video,) = s2q.generate(tmp_path / "out", prompts=["a"], dtype="bfloat16", **call)
    assert torch.isfinite(video.latents).all()


def test_a_weight_that_is_not_that_of_the_source_is_refused(sdnq, tmp_path, monkeypatch):
    folder, decoded = sdnq((CONVROT,)), module.decoded
    monkeypatch.setattr(module, "decoded", lambda weight, form: decoded(weight, form) * (1 + 1e-4))
    with pytest.raises(S2QError, match="its weight differs by 1.0e-04 of its largest magnitude"):
        s2q.convert(folder, out=tmp_path / "out")


def test_a_branch_may_differ_by_the_rounding_of_bf16_and_not_by_more(sdnq, tmp_path, monkeypatch):
    folder, decoded = sdnq((CONVROT, *BRANCH)), module.decoded

    def scaled(weight, form):
        assert weight.up is not None
        return decoded(module.replace(weight, up=weight.up * 1.1), form)

    monkeypatch.setattr(module, "decoded", scaled)
    with pytest.raises(S2QError, match="its weight differs by .* expected at most"):
        s2q.convert(folder, out=tmp_path / "out")


def test_the_recipe_has_the_width_of_most_weights(sdnq, tmp_path):
    first = LINEAR.replace("to_q", "to_k")  # the first by name

    def widen(stored):
        stored[f"{first}.weight"] = torch.ones(64, 64, dtype=torch.int8)
        stored[f"{first}.scale"] = torch.ones(1, 64)

    def own(config):
        config["modules_quant_config"][f".{first}."] = {"weights_dtype": "int8"}

    report = s2q.convert(sdnq((CONVROT,), config=own, tensors=widen), out=tmp_path / "out")
    assert next(iter(report.layers)).scheme == "w8a8"
    assert report.recipe == "sdnq-w4a8"


def test_another_version_of_the_tool_is_warned_of_and_recorded(sdnq, tmp_path, caplog):
    folder = sdnq((CONVROT,), config=lambda config: config.update(sdnq_version="0.9.1"))
    with caplog.at_level(logging.WARNING):
        report = s2q.convert(folder, out=tmp_path / "out")
    assert "was written by sdnq '0.9.1'; the reader was compared with 0.2.8" in caplog.text
    assert (report.tool_version, report.compared_version) == ("0.9.1", "0.2.8")
    caplog.clear()
    edit_json(folder / "transformer/config.json", quantization_config=_config(folder) | {"sdnq_version": "0.2.8"})
    s2q.convert(folder, out=tmp_path / "out", overwrite=True)
    assert "written by" not in caplog.text


def _config(folder):
    return json.loads((folder / "transformer/config.json").read_text())["quantization_config"]


def variant_of(folder):
    """Rename the weights of a pipeline's components to those of a variant."""
    (folder / MANIFEST).unlink()
    for path in folder.glob("*/*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    return folder


def test_a_variant_is_that_of_the_base_where_the_source_has_none(sdnq, comfyui, made, tmp_path):
    base = variant_of(shutil.copytree(made("cogvideox", CONVROT), tmp_path / "base"))
    folder = sdnq((CONVROT,))
    with pytest.raises(InvalidInputError, match="has only weights of variant fp16; pass --variant fp16"):
        s2q.convert(folder, base=base, out=tmp_path / "out")
    s2q.convert(folder, base=base, variant="fp16", out=tmp_path / "out")
    assert (tmp_path / "out/vae/diffusion_pytorch_model.safetensors").is_file()
    assert_refused(
        "no weights of variant 'fp32'", folder, tmp_path / "other", base=made("cogvideox", CONVROT), variant="fp32"
    )
    base = variant_of(shutil.copytree(made("wan", CONVROT), tmp_path / "wan"))
    s2q.convert(comfyui(CONVROT), base=base, variant="fp16", out=tmp_path / "file")


@pytest.mark.parametrize("layers", [[1], None, "x", 1])
def test_marks_of_a_header_that_are_no_object_are_refused(made, comfyui, layers, tmp_path):
    file = comfyui(CONVROT, metadata={"_quantization_metadata": json.dumps({"layers": layers})})
    assert_refused("its marks of quantized linears are damaged", file, tmp_path / "out", base=made("wan", CONVROT))


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_other_components_of_a_file_are_named_and_not_read(made, comfyui, prefix, tmp_path, caplog):
    def add(stored):
        for name in list(stored):
            stored[prefix + name] = stored.pop(name)
        stored["vae.decoder.weight"] = torch.ones(2)
        stored["text_encoder.x.comfy_quant"] = torch.tensor(list(b"{}"), dtype=torch.uint8)
        stored["text_encoder.x.weight"] = torch.ones(2)

    with caplog.at_level(logging.WARNING):
        s2q.convert(comfyui(CONVROT, tensors=add), out=tmp_path / "out", base=made("wan", CONVROT))
    assert "has other components beside the transformer ('text_encoder', 'vae'); they are not read" in caplog.text
    ours, theirs = (packed_linears(path)[1] for path in (tmp_path / "out", made("wan", CONVROT)))
    assert all(torch.equal(ours[name].codes(), layer.codes()) for name, layer in theirs.items())


def test_the_card_names_the_full_precision_model(sdnq, tmp_path):
    folder, out = sdnq((CONVROT,)), tmp_path / "out"
    edit_json(folder / "transformer/config.json", _name_or_path="acme/video")
    (folder / "README.md").write_text("---\nlicense: mit\ntags:\n- video\n---\n# A model\n")
    s2q.convert(folder, out=out)
    front = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert front == {
        "base_model": "acme/video",
        "base_model_relation": "quantized",
        "library_name": "diffusers",
        "license": "mit",
        "pipeline_tag": "text-to-video",
        "tags": ["video", "s2q", "quantized", "sdnq"],
    }
    assert full_precision_origin(out) == "acme/video"
    (out / "README.md").unlink()
    assert full_precision_origin(out) == "acme/video"
    assert verify_manifest(out) == ["README.md: missing"]
    assert quantization_scheme(out) == "w4a8"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("acme/wan", {"base_model": "acme/wan", "base_model_relation": "quantized"}), ("folder", {})],
)
def test_the_card_of_a_file_names_its_base_and_not_the_model_of_the_bases_card(
    made, comfyui, name, expected, tmp_path, monkeypatch
):
    base = shutil.copytree(made("wan", CONVROT), tmp_path / "base")
    (base / MANIFEST).unlink()
    card = "---\nlicense: mit\nbase_model: other/model\nbase_model_relation: finetune\n---\n# Base\n"
    (base / "README.md").write_text(card)
    resolve = reading.resolve_model
    monkeypatch.setattr(
        reading, "resolve_model", lambda *args, **options: replace(resolve(*args, **options), name=name)
    )
    s2q.convert(comfyui(CONVROT), base=base, out=tmp_path / "out")
    front = front_matter((tmp_path / "out/README.md").read_text())
    assert front["license"] == "mit"
    assert {key: value for key, value in front.items() if key.startswith("base_model")} == expected


def test_an_unknown_origin_is_not_the_converted_model_itself(sdnq, made, tmp_path):
    folder = sdnq((CONVROT,))
    (folder / "README.md").unlink()
    report = s2q.convert(folder, out=tmp_path / "out")
    assert (report.source, full_precision_origin(tmp_path / "out")) == ("sdnq", None)
    checkpoint = shutil.copytree(made("cogvideox", CONVROT), tmp_path / "checkpoint")
    (checkpoint / "README.md").unlink()
    assert full_precision_origin(checkpoint) == json.loads((checkpoint / "s2q/report.json").read_text())["source"]


@pytest.fixture
def half(made, tmp_path):
    """A folder of SDNQ with two transformers, the second in full precision."""
    checkpoint = made("wan 2.2 a14b", CONVROT)
    folder = tmp_path / "half"
    s2q.export(checkpoint, to="sdnq", out=folder)
    (folder / MANIFEST).unlink()
    shutil.rmtree(folder / "transformer_2")
    s2q.export(checkpoint, to="diffusers", out=tmp_path / "plain")
    shutil.move(tmp_path / "plain/transformer_2", folder / "transformer_2")
    return folder


def test_a_transformer_in_full_precision_is_copied_and_counted(half, tmp_path):
    report = s2q.convert(half, out=tmp_path / "out")
    copied = load_file(tmp_path / "out/transformer_2/diffusion_pytorch_model.safetensors")
    inspected = s2q.inspect(tmp_path / "out")
    assert report.storage["quantized_bytes"] > sum(tensor.nbytes for tensor in copied.values())
    for key in ("full_precision_bytes", "quantized_bytes", "ratio"):
        assert report.storage[key] == inspected.storage[key]


def test_a_transformer_that_is_copied_is_checked(half, tmp_path):
    path = half / "transformer_2/diffusion_pytorch_model.safetensors"
    content, tensors = path.read_bytes(), load_file(path)
    path.write_bytes(content[:-100])
    assert_refused("transformer_2.*truncated", half, tmp_path / "out")
    save_file({**tensors, "proj_out.bias": torch.ones(1)}, path)
    assert_refused(r"proj_out.bias: got shape \[1\]", half, tmp_path / "out")
    path.unlink()
    (tmp_path / "outside").write_bytes(content)
    path.symlink_to(tmp_path / "outside")
    assert_refused("a link that leads out of the folder, which is not copied", half, tmp_path / "out")


def test_both_transformers_are_checked_before_one_is_converted(made, tmp_path, monkeypatch):
    s2q.export(made("wan 2.2 a14b", CONVROT), to="sdnq", out=tmp_path / "sdnq")
    (tmp_path / "sdnq" / MANIFEST).unlink()
    path = tmp_path / "sdnq/transformer_2/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("to_q.scale"))
    save_file({**tensors, name: -tensors[name]}, path)
    monkeypatch.setattr(module._Job, "write_component", lambda *args, **options: pytest.fail("written"))
    assert_refused("transformer_2.*: is stored with weight_scale contains scales", tmp_path / "sdnq", tmp_path / "out")


def sdnq_of_nothing(folder, component):
    """Give a transformer in full precision the configuration of SDNQ, which quantizes none of its linears."""
    edit_json(folder / component / "config.json", quantization_config={"quant_method": "sdnq", "sdnq_version": "0.2.8"})


def test_a_transformer_without_a_quantized_linear_is_copied_and_needs_another_with_some(half, tmp_path):
    sdnq_of_nothing(half, "transformer_2")
    report = s2q.convert(half, out=tmp_path / "out")
    assert not any(layer.name.startswith("transformer_2.") for layer in report.layers)
    assert "quantization_config" not in json.loads((tmp_path / "out/transformer_2/config.json").read_text())
    name = "transformer_2/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (half / name).read_bytes()
    assert report.storage["ratio"] == s2q.inspect(tmp_path / "out").storage["ratio"]
    shutil.rmtree(half / "transformer")
    shutil.copytree(half / "transformer_2", half / "transformer")
    assert_refused("half: transformer and transformer_2 without a quantized linear", half, tmp_path / "none")


def test_marks_of_text_encoders_alone_are_refused(made, comfyui, tmp_path):
    def unmark(stored):
        for name in list(stored):
            tensor = stored.pop(name)
            if not name.endswith(".comfy_quant"):
                stored[f"model.diffusion_model.{name}"] = tensor
        stored["text_encoders.x.comfy_quant"] = torch.tensor(list(b"{}"), dtype=torch.uint8)
        stored["text_encoders.x.weight"] = torch.ones(2)

    words = "its transformer has no linears with comfy_quant"
    assert_refused(words, comfyui(CONVROT, tensors=unmark), tmp_path / "out", base=made("wan", CONVROT))
