"""Tiny checkpoints to export, made once a session."""

import pytest

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
