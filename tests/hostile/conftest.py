"""A tiny checkpoint whose linears have every common part of an input path, and copies of it."""

import shutil

import pytest
import torch

from faults.conftest import SMALL
from s2q.run.quantize import quantize
from tiny import tiny_pipeline


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    out = tmp_path_factory.mktemp("hostile") / "checkpoint"
    prompts = ["a red circle", "a blue square"]
    quantize(
        tiny_pipeline("cogvideox", dtype=torch.bfloat16),
        recipe="s2q-plus-w4a6",
        prompts=prompts,
        overrides=SMALL,
        out=out,
    )
    return out


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")
