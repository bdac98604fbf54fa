"""What an export reads and replaces: never its checkpoint, never what it did not write, nothing outside of a folder."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

import s2q
from s2q.common.errors import InvalidInputError
from s2q.exports.export import ExportReport
from s2q.exports.folder import write_card
from s2q.exports.targets import TARGETS

RECIPE = "convrot-w4a8"


@pytest.fixture
def checkpoint(made, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(made("cogvideox", RECIPE), tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("checkpoint", "is the"),
        ("checkpoint/out", "is inside of"),
        ("checkpoint/vae/out", "is inside of"),
        (".", "contains"),
    ],
)
def test_an_output_is_apart_from_its_checkpoint(checkpoint, tmp_path, name, where):
    before = sorted(tmp_path.rglob("*"))
    for overwrite in (False, True):
        with pytest.raises(InvalidInputError, match=f"{where}.*checkpoint.*choose a name outside"):
            s2q.export(checkpoint, to="diffusers", out=tmp_path / name, overwrite=overwrite)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_is_not_written_into_its_checkpoint(made):
    checkpoint = made("wan", RECIPE)
    out = checkpoint / "transformer/diffusion_pytorch_model.safetensors"
    before = out.read_bytes()
    with pytest.raises(InvalidInputError, match="is inside of the checkpoint"):
        s2q.export(checkpoint, to="comfyui", out=out, overwrite=True)
    assert out.read_bytes() == before


def test_another_checkpoint_is_not_replaced(made, checkpoint):
    with pytest.raises(InvalidInputError, match="was not written by this command"):
        s2q.export(made("cogvideox", "rtn-w4a8"), to="diffusers", out=checkpoint, overwrite=True)
    s2q.load(checkpoint)


def test_quantize_does_not_replace_an_export(made, tiny_model, tmp_path):
    s2q.export(made("cogvideox", RECIPE), to="diffusers", out=tmp_path / "out")
    before = (tmp_path / "out/s2q/manifest.json").read_bytes()
    with pytest.raises(InvalidInputError, match="was not written by this command"):
        s2q.quantize(tiny_model, recipe="rtn-w4a8", out=tmp_path / "out", overwrite=True)
    assert (tmp_path / "out/s2q/manifest.json").read_bytes() == before


def test_the_record_of_a_folder_is_the_report(made, tmp_path):
    report = s2q.export(made("cogvideox", RECIPE), to="diffusers", out=tmp_path / "out")
    assert ExportReport(**json.loads((tmp_path / "out/s2q/export.json").read_text())) == report


@pytest.mark.parametrize("content", [b"", b"GGUF", b"text of a user", b"\x08" + b"\xff" * 40])
def test_files_of_others_are_not_replaced(made, tmp_path, content):
    checkpoint = made("wan", RECIPE)
    out = tmp_path / "x.safetensors"
    out.write_bytes(content)
    with pytest.raises(InvalidInputError, match="x.safetensors exists and was not written by this command"):
        s2q.export(checkpoint, to="comfyui", out=out, overwrite=True)
    assert out.read_bytes() == content
    assert not TARGETS["gguf"].file.wrote(out)


def test_files_tell_who_wrote_them(tmp_path):
    tensors = {"a": torch.ones(2)}
    for name in ("comfyui", "gguf"):
        file = TARGETS[name].file
        file.write(tmp_path / name, tensors, {}, "wan")
        assert file.wrote(tmp_path / name)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert not TARGETS["comfyui"].file.wrote(tmp_path / "theirs")
    ours = (tmp_path / "gguf").read_bytes()
    (tmp_path / "theirs").write_bytes(ours.replace(b"s2q export", b"llama.cpp!"))
    assert not TARGETS["gguf"].file.wrote(tmp_path / "theirs")


def test_components_that_lead_out_of_the_folder_are_not_copied(checkpoint, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/key").write_text("x")
    index = json.loads((checkpoint / "model_index.json").read_text())
    (checkpoint / "model_index.json").write_text(json.dumps({**index, "../secret": "x"}))
    s2q.export(checkpoint, to="diffusers", out=tmp_path / "out", verify=False)
    assert not list(tmp_path.glob("out/**/key"))
    (checkpoint / "vae/key").symlink_to(tmp_path / "secret/key")
    with pytest.raises(InvalidInputError, match="vae/key: a link that leads out of the folder, which is not copied"):
        s2q.export(checkpoint, to="diffusers", out=tmp_path / "other", verify=False)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("shards", ["10GB", "20KB"])
def test_a_variant_is_exported_under_plain_names(made, tmp_path, shards):
    pipe = s2q.load(made("cogvideox", RECIPE))
    pipe.save_pretrained(tmp_path / "saved", variant="fp16", max_shard_size=shards)
    s2q.export(tmp_path / "saved", to="diffusers", out=tmp_path / "out", variant="fp16")
    assert not list(tmp_path.glob("out/**/*fp16*"))
    exported = DiffusionPipeline.from_pretrained(tmp_path / "out")
    for component in ("vae", "text_encoder"):
        theirs, ours = (getattr(each, component).state_dict() for each in (pipe, exported))
        assert all(torch.equal(ours[name].to(tensor.dtype), tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize(
    ("card", "front"),
    [
        (b"---\nlicense: mit\n---\n# A model", "---\nlicense: mit\n---\n\n"),
        (b"---\nlicense: mit\n# no end", ""),
        (b"---- a rule\n---\n", ""),
        (b"---\ntitle: a---\nb: \xff\n---\n", "---\ntitle: a---\nb: \ufffd\n---\n\n"),
        (b"# A model\n---\n---\n", ""),
    ],
)
def test_front_matter_of_a_card_is_kept(tmp_path, card, front):
    (tmp_path / "staged").mkdir()
    (tmp_path / "README.md").write_bytes(card)
    write_card(tmp_path, tmp_path / "staged", "text")
    assert (tmp_path / "staged/README.md").read_text() == f"{front}text"
