"""A tiny model, the weights of an undisturbed run, and a count of the blocks that are quantized."""

import contextlib

import pytest
import torch

from s2q.run import runner
from s2q.run.quantize import quantize
from tiny import tiny_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline("cogvideox", num_layers=3, dtype=torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reference(folder, tmp_path_factory):
    """Weights of an uninterrupted run."""
    out = tmp_path_factory.mktemp("reference") / "out"
    quantize(folder, recipe="rtn-w4a6", out=out)
    return (out / "transformer/diffusion_pytorch_model.safetensors").read_bytes()


@pytest.fixture
def count_blocks(monkeypatch):
    """Names of the linears of each block that is computed, not resumed; killing after `stop_after` blocks."""
    state = {"computed": [], "stop_after": None}
    original = runner.quantize_block

    def counted(task):
        if state["stop_after"] is not None and len(state["computed"]) >= state["stop_after"]:
            raise KeyboardInterrupt
        state["computed"].append(min(linear.name for linear in task.linears))
        return original(task)

    monkeypatch.setattr(runner, "quantize_block", counted)
    return state


@pytest.fixture
def interrupt(count_blocks):
    """A context in which a run is interrupted after some blocks."""

    @contextlib.contextmanager
    def interrupt(*, after=1):
        count_blocks.update(stop_after=after, computed=[])
        with pytest.raises(KeyboardInterrupt):
            yield
        count_blocks.update(stop_after=None, computed=[])

    return interrupt
