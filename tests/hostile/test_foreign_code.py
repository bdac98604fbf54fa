"""No checkpoint makes its loader run code, read a pickle, or read outside of its folder."""

import contextlib
import json
import os
import pickle
import random
import shutil
import sys

import pytest
import torch

import s2q
from hostile.foreign_code import WAYS, RunsCode, ask_for_code, source
from s2q.checkpoint import write_manifest
from s2q.common.errors import InvalidInputError, S2QError
from s2q.models import resolve_model

COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A file that modules in the current folder write when they are imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "canary"
    (tmp_path / "evil_module.py").write_text(source(path))
    yield path
    sys.modules.pop("evil_module", None)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("way", WAYS)
def test_no_way_of_asking_runs_code(copy, canary, way):
    ask_for_code(copy, random.Random(1), canary, way=way)
    write_manifest(copy)
    with contextlib.suppress(S2QError):
        s2q.load(copy)
    assert not canary.exists()
    assert "evil_module" not in sys.modules


@pytest.mark.parametrize("verify", [None, False])
@pytest.mark.parametrize("component", COMPONENTS)
def test_a_library_that_would_be_imported_is_refused(copy, canary, component, verify):
    edit(copy / "model_index.json", **{component: ["evil_module", "Model"]})
    write_manifest(copy)
    for load in (lambda: s2q.load(copy, verify=verify), lambda: resolve_model(copy)):
        with pytest.raises(
            InvalidInputError, match=rf"'{component}' is \['evil_module', 'Model'\]; expected a class of"
        ):
            load()
    assert not canary.exists()


def test_modules_of_diffusers_pipelines_are_known_without_importing_them(copy):
    edit(copy / "model_index.json", connectors=["ltx2", "LTX2TextConnectors"], nothing=[None, None])
    assert resolve_model(copy).component_classes["connectors"] == ("ltx2", "LTX2TextConnectors")
    edit(copy / "model_index.json", connectors=["../ltx2", "LTX2TextConnectors"])
    with pytest.raises(InvalidInputError, match="expected a class of diffusers or transformers"):
        resolve_model(copy)


@pytest.mark.parametrize("name", ["../transformer", "/vae", "a/b", "..", "a\0"])
def test_the_index_names_folders_beside_it_only(copy, name):
    edit(copy / "model_index.json", **{name: ["diffusers", "AutoencoderKLCogVideoX"]})
    write_manifest(copy)
    with pytest.raises(InvalidInputError, match="expected the name of a folder beside it"):
        s2q.load(copy)


def test_a_pipeline_with_code_of_its_own_is_refused(copy, canary):
    edit(copy / "model_index.json", _class_name=["pipeline", "Evil"])
    (copy / "pipeline.py").write_text(source(canary))
    write_manifest(copy)
    with pytest.raises(
        InvalidInputError, match=r"_class_name=\['pipeline', 'Evil'\] is a pipeline with code of its own"
    ):
        s2q.load(copy)
    assert not canary.exists()


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_a_kernel_of_the_hub_is_refused_at_any_depth(copy, key):
    edit(copy / "text_encoder/config.json", text_config={"inner": [{key: "evil/kernel"}]})
    write_manifest(copy)
    with pytest.raises(InvalidInputError, match=rf"config\.json: {key}='evil/kernel' names a kernel on the Hub"):
        s2q.load(copy)


def test_auto_classes_with_code_are_refused_and_other_classes_ignore_it(copy, canary):
    edit(copy / "text_encoder/config.json", auto_map={"AutoModel": "modeling.Model"})
    (copy / "text_encoder/modeling.py").write_text(source(canary))
    write_manifest(copy)
    s2q.load(copy)
    edit(copy / "model_index.json", text_encoder=["transformers", "AutoModel"])
    write_manifest(copy)
    with pytest.raises(InvalidInputError, match=r"config\.json: auto_map names code in the model's repository"):
        s2q.load(copy)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["model_index.json", "adapter_config.json", "diffusers.py"])
def test_a_component_has_neither_pipelines_nor_adapters_nor_modules_of_its_own(copy, name):
    (copy / "vae" / name).write_text("{}")
    write_manifest(copy)
    with pytest.raises(InvalidInputError, match=rf"vae/{name}: not loaded; expected the files of one AutoencoderKL"):
        s2q.load(copy)


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_pickled_weights_are_never_opened(copy, canary, component):
    for weights in (copy / component).glob("*.safetensors"):
        stem = {"model": "pytorch_model"}.get(weights.stem, weights.stem)
        (copy / component / f"{stem}.bin").write_bytes(pickle.dumps(RunsCode(canary)))
        weights.unlink()
    write_manifest(copy)
    with pytest.raises(InvalidInputError, match=rf"{component}: has only pickled weights .*, which are not read"):
        s2q.load(copy)
    assert not canary.exists()


def test_the_quantizer_refuses_pickled_weights_of_diffusers_loader(copy):
    from diffusers import CogVideoXTransformer3DModel
    from safetensors.torch import load_file

    weights = copy / "transformer/diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    write_manifest(copy)
    with pytest.raises(InvalidInputError, match=r"diffusion_pytorch_model\.bin: pickled weights, .* not read"):
        CogVideoXTransformer3DModel.from_pretrained(copy, subfolder="transformer")


def test_a_link_out_of_the_folder_is_refused_and_one_within_is_not(copy, tmp_path):
    outside = tmp_path / "outside.json"
    inside = copy / "vae/config.json"
    shutil.move(inside, outside)
    inside.symlink_to(outside)
    write_manifest(copy)
    with pytest.raises(InvalidInputError, match=r"vae/config\.json: a link that leads out of the folder"):
        s2q.load(copy)
    shutil.move(outside, copy / "vae/other.json")
    inside.unlink()
    inside.symlink_to("other.json")
    write_manifest(copy)
    s2q.load(copy)


def test_a_folder_that_is_a_link_out_is_refused(copy, tmp_path):
    shutil.move(copy / "vae", tmp_path / "vae")
    (copy / "vae").symlink_to(tmp_path / "vae")
    write_manifest(copy)
    with pytest.raises(InvalidInputError, match="vae: a link that leads out of the folder"):
        s2q.load(copy)


def test_the_links_of_the_hubs_cache_are_followed(checkpoint, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0123"
    blobs.mkdir(parents=True)
    shutil.copytree(checkpoint, snapshot)
    for number, path in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        shutil.move(path, blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    s2q.load(snapshot)


@pytest.mark.parametrize(
    "name", ["vae/config.json", "transformer/config.json", "tokenizer/added_tokens.json", "s2q/manifest.json"]
)
@pytest.mark.parametrize("rebuilt", [True, False])
def test_a_pipe_in_place_of_a_file_does_not_hang(copy, name, rebuilt):
    (copy / name).unlink(missing_ok=True)
    os.mkfifo(copy / name)
    if rebuilt and not name.startswith("s2q"):
        write_manifest(copy)
    with pytest.raises(InvalidInputError, match=name.removeprefix("transformer/")):
        s2q.load(copy)


def test_a_device_in_place_of_the_manifest_does_not_hang(copy):
    (copy / "s2q/manifest.json").unlink()
    (copy / "s2q/manifest.json").symlink_to("/dev/zero")
    with pytest.raises(InvalidInputError, match=r"manifest\.json: cannot be read as JSON \(.*not a regular file"):
        s2q.load(copy)
