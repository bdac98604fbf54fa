"""The full-precision model of a run: whether its weights can leave memory, since files have them."""

import pytest
import torch

from s2q.calibration.teacher import load_teacher
from s2q.models import resolve_model
from s2q.recipes.load import load_recipe
from tiny import tiny_pipeline


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline("cogvideox", dtype=torch.bfloat16).save_pretrained(path)
    return resolve_model(path)


@pytest.mark.parametrize(("dtype", "mapped"), [(None, True), ("bfloat16", True), ("float32", False)])
def test_weights_are_mapped_unless_they_are_converted(source, dtype, mapped):
    assert load_teacher(source, load_recipe("rtn-w4a6"), dtype=dtype).mapped == mapped


def test_what_was_loaded_before_is_held_by_someone_else(source):
    teacher = load_teacher(source.load_pipeline(), load_recipe("rtn-w4a6"), dtype=None)
    assert not teacher.mapped
