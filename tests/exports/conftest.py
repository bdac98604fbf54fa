"""Tiny checkpoints to export, made once a session."""

import json

import pytest
from safetensors.torch import load_file, save_file

import s2q
from exported import WEIGHTS
from s2q.checkpoint import MANIFEST
from s2q.recipes.load import load_recipe
from s2q.run.quantize import quantize
from tiny import tiny_pipeline


@pytest.fixture(scope="session")
def made(tmp_path_factory, tiny_model):
    """Returns the checkpoint of a family, a recipe and overrides; calibration takes two samples."""
    known = {}

    def make(family, name, *overrides):
        key = (family, name, overrides)
        if key not in known:
            known[key] = tmp_path_factory.mktemp("exported") / "checkpoint"
            recipe = load_recipe(name, overrides=list(overrides))
            samples = {"prompts": ["a", "b"], "samples": 2} if recipe.calibrates else {}
            model = tiny_model if family == "cogvideox" else tiny_pipeline(family)
            quantize(model, recipe=recipe, out=known[key], **samples)
        return known[key]

    return make


@pytest.fixture
def sdnq(made, tmp_path):
    """Returns an export to SDNQ, its configuration and tensors changed by functions."""

    def make(recipe, *, config=lambda content: None, tensors=lambda content: None):
        folder = tmp_path / "sdnq"
        s2q.export(made("cogvideox", *recipe), to="sdnq", out=folder)
        path = folder / "transformer/config.json"
        content, stored = json.loads(path.read_text()), load_file(folder / WEIGHTS)
        config(content["quantization_config"])
        tensors(stored)
        path.write_text(json.dumps(content))
        save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / WEIGHTS)
        (folder / MANIFEST).unlink()  # as SDNQ writes none
        return folder

    return make


@pytest.fixture
def comfyui(made, tmp_path):
    """Returns an export to ComfyUI, its tensors changed by a function, with other metadata."""

    def make(*recipe, tensors=lambda content: None, metadata=None):
        file = tmp_path / "model.safetensors"
        s2q.export(made("wan", *recipe), to="comfyui", out=file)
        stored = load_file(file)
        tensors(stored)
        save_file(stored, file, metadata=metadata)
        return file

    return make
