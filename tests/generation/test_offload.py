"""Offload of a pipeline; what it does on a GPU is in tests/emulation/test_offloaded_runs.py."""

import pytest
import torch
from accelerate import cpu_offload

import s2q
from s2q.common.errors import InvalidInputError, UsageError
from s2q.common.memory import outside
from s2q.generation.offload import fitting_offload, layers_of, model_parts, offload_pipeline, pages_of
from tiny import tiny_pipeline


@pytest.mark.parametrize("name", ["cogvideox", "hunyuanvideo", "wan 2.2 a14b", "ltx-2"])
def test_pages_are_blocks_and_layers(name):
    pipe = tiny_pipeline(name)
    pages = pages_of(pipe)
    assert pages.keys() == {part for part in model_parts(pipe) if part.startswith(("transformer", "text_encoder"))}
    assert all(pages.values())
    for part, blocks in pages.items():
        inside = sum(tensor.numel() for block in blocks for tensor in block.parameters())
        rest = sum(tensor.numel() for module in outside(pipe.components[part], blocks) for tensor in direct(module))
        assert inside + rest >= sum(tensor.numel() for tensor in pipe.components[part].parameters())


def direct(module):
    return module.parameters(recurse=False)


def test_lists_inside_of_layers_are_no_layers():
    inner = torch.nn.ModuleList([torch.nn.Linear(1, 1)])
    layer = torch.nn.Module()
    layer.parts = inner
    encoder = torch.nn.Module()
    encoder.layers = torch.nn.ModuleList([layer])
    assert layers_of(encoder) == [layer]


@pytest.mark.parametrize(("share", "expected"), [(1.5, "none"), (1.4, "model"), (0.1, "group")])
def test_what_leaves_room_is_chosen(share, expected, monkeypatch):
    pipe = tiny_pipeline("wan 2.2 a14b")
    total = sum(tensor.nbytes for part in model_parts(pipe).values() for tensor in part.state_dict().values())
    monkeypatch.setattr("s2q.generation.offload.device_memory_bytes", lambda _device: int(share * total))
    assert fitting_offload(pipe, "cuda") == expected
    assert fitting_offload(pipe, "cpu") == "none"
    monkeypatch.setattr("s2q.generation.offload.device_memory_bytes", lambda _device: int(2 * share * total))
    assert fitting_offload(pipe, "cuda", sharing=2) == expected


def test_a_pipeline_that_is_offloaded_already_is_refused():
    pipe = tiny_pipeline("cogvideox")
    cpu_offload(pipe.text_encoder, torch.device("cpu"))
    with pytest.raises(InvalidInputError, match="its text_encoder is offloaded by diffusers; load the pipeline"):
        offload_pipeline(pipe, "cuda", offload="model")


def test_loaded_pipelines_take_no_offload():
    pipe = tiny_pipeline("cogvideox")
    with pytest.raises(UsageError, match="offload is for models by name"):
        s2q.generate(pipe, prompts=["red"], offload="none")
    with pytest.raises(UsageError, match="offload is for models by name"):
        s2q.evaluate(pipe, reference=pipe, prompts=["red"], offload="none")
