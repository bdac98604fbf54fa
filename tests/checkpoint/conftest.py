"""A tiny quantized checkpoint, made once a module; tests that alter it take a copy."""

import shutil

import pytest
import torch

from s2q.run.quantize import quantize
from tiny import tiny_pipeline


@pytest.fixture(scope="package")
def teacher():
    return tiny_pipeline("cogvideox", dtype=torch.bfloat16)


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory, teacher):
    """The tiny pipeline under rtn-w4a6, in bf16."""
    out = tmp_path_factory.mktemp("checkpoint") / "tiny-w4a6"
    quantize(teacher, recipe="rtn-w4a6", out=out)
    return out


@pytest.fixture(scope="package")
def checkpoint_fp32(tmp_path_factory):
    """The tiny pipeline under rtn-w4a6, in fp32 throughout."""
    out = tmp_path_factory.mktemp("checkpoint") / "tiny-w4a6-fp32"
    quantize(tiny_pipeline("cogvideox"), recipe="rtn-w4a6", out=out)
    return out


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")
