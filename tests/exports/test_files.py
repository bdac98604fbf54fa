"""Exports that are one file, from refusals to the file that replaces another."""

from dataclasses import replace

import pytest
import torch

import s2q
from exported import CONVROT, GROUPS
from s2q.common.components import TRANSFORMERS
from s2q.common.errors import InvalidInputError, S2QError, UsageError
from s2q.exports.targets import TARGETS
from tiny import tiny_pipeline

FILES = pytest.mark.parametrize(("target", "name"), [("gguf", "out.gguf"), ("comfyui", "out.safetensors")])
FITTING = {"gguf": ("rtn-w4a16", *GROUPS), "comfyui": (CONVROT,)}


@FILES
def test_a_file_is_refused_with_the_reason_and_nothing_is_written(made, target, name, tmp_path):
    out = tmp_path / name
    with pytest.raises(UsageError, match="whose name ends in"):
        s2q.export(made("wan", *FITTING[target]), to=target, out=tmp_path / "folder")
    with pytest.raises(InvalidInputError, match="does not know the original names of CogVideoXTransformer3DModel"):
        s2q.export(made("cogvideox", *FITTING[target], "modulation=null"), to=target, out=out)
    with pytest.raises(InvalidInputError, match=rf"{target} cannot store .*; quantize the model with s2q-export"):
        s2q.export(made("wan", "rtn-w4a8"), to=target, out=out)
    with pytest.raises(
        UsageError, match=rf"two transformers, and {target} .*; pass --component transformer or transformer_2 "
    ):
        s2q.export(made("wan 2.2 a14b", *FITTING[target]), to=target, out=out)
    with pytest.raises(
        InvalidInputError, match=r"got transformer_2, which .* has not quantized; expected transformer$"
    ):
        s2q.export(made("wan", *FITTING[target]), to=target, out=out, component="transformer_2")
    assert list(tmp_path.iterdir()) == []


@FILES
@pytest.mark.parametrize("component", TRANSFORMERS)
def test_a_file_has_the_transformer_that_is_named(made, target, name, component, tmp_path):
    checkpoint = made("wan 2.2 a14b", *FITTING[target])
    report = s2q.export(checkpoint, to=target, out=tmp_path / name, component=component)
    transformer = getattr(s2q.load(checkpoint, dtype="float32"), component)
    tensors, _ = TARGETS[target].file.read(tmp_path / name)
    assert torch.equal(tensors["head.modulation"], transformer.scale_shift_table)
    assert torch.equal(tensors["blocks.0.ffn.0.bias"], transformer.blocks[0].ffn.net[0].proj.bias)
    parameters = sum(
        tensor.numel() for tensor in getattr(tiny_pipeline("wan 2.2 a14b"), component).state_dict().values()
    )
    assert (report.component, report.storage["full_precision_bytes"]) == (component, 2 * parameters)


@FILES
def test_what_a_file_cannot_store_of_the_second_transformer_has_its_full_name(made, target, name, tmp_path):
    with pytest.raises(InvalidInputError, match=r"^transformer_2\.blocks\.0\.attn1\.to_"):
        s2q.export(made("wan 2.2 a14b", "rtn-w4a8"), to=target, out=tmp_path / name, component="transformer_2")


@pytest.mark.parametrize("target", ["sdnq", "diffusers"])
def test_a_folder_has_all_transformers(made, target, tmp_path):
    with pytest.raises(UsageError, match=rf"got transformer; {target} writes a folder with all transformers, omit it"):
        s2q.export(made("wan 2.2 a14b", CONVROT), to=target, out=tmp_path / "out", component="transformer")
    assert list(tmp_path.iterdir()) == []


@FILES
def test_a_folder_is_not_replaced_by_a_file(made, target, name, tmp_path):
    out = tmp_path / name
    out.mkdir()
    for overwrite in (False, True):
        with pytest.raises(InvalidInputError, match=f"{name} is a folder; pass a file"):
            s2q.export(made("wan", *FITTING[target]), to=target, out=out, overwrite=overwrite)
    assert list(tmp_path.rglob("*")) == [out]


def reversed_rows(tensors, marks):
    name = next(name for name in tensors if name.endswith("ffn.0.weight"))
    return tensors | {name: tensors[name].flip(0)}, marks


def without_a_bias(tensors, marks):
    return {name: tensor for name, tensor in tensors.items() if name != "blocks.0.ffn.0.bias"}, marks


def without_a_mark(tensors, marks):
    return tensors, {name: mark for name, mark in marks.items() if name != "blocks.0.ffn.0"}


def with_another_mark(tensors, marks):
    return tensors, marks | {"blocks.0.ffn.0": "Q8_0"}


@FILES
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (reversed_rows, "blocks.0.ffn.net.0.proj.weight: was read back with other values"),
        (without_a_bias, "blocks.0.ffn.net.0.proj.bias: in the written file or in the checkpoint alone"),
        (without_a_mark, "the formats of its linears were read back with other values"),
        (with_another_mark, "the formats of its linears were read back with other values"),
    ],
)
def test_a_file_that_is_read_back_otherwise_is_discarded(made, target, name, damage, message, tmp_path, monkeypatch):
    file = TARGETS[target].file
    damaged = replace(file, read=lambda path: damage(*file.read(path)))
    monkeypatch.setattr("s2q.exports.export.TARGETS", {target: replace(TARGETS[target], file=damaged)})
    with pytest.raises(S2QError, match=f"{message}; nothing was exported"):
        s2q.export(made("wan", *FITTING[target]), to=target, out=tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@FILES
def test_a_file_is_replaced_with_overwrite_only(made, target, name, tmp_path):
    out = tmp_path / name
    s2q.export(made("wan", *FITTING[target]), to=target, out=out)
    with pytest.raises(InvalidInputError, match="exists; pass --overwrite"):
        s2q.export(made("wan", *FITTING[target]), to=target, out=out)
    before = out.read_bytes()
    s2q.export(made("wan", *FITTING[target]), to=target, out=out, overwrite=True)
    assert out.read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]
