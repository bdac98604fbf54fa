"""Mapped weights leave memory and come back as they were; what was on another device is what it was before."""

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from s2q.common.memory import (
    on_device,
    page_out,
    tensors_of,
    to_device,
)


def mapped_bytes():
    """Resident bytes of this process that have a file behind them."""
    return 1024 * int(re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a call of the Linux kernel")
def test_paging_out_gives_the_memory_of_mapped_tensors_back_and_keeps_their_values(tmp_path):
    weight = torch.randn(4096, 4096)
    save_file({"weight": weight}, tmp_path / "w.safetensors")
    tensor = load_file(tmp_path / "w.safetensors")["weight"]
    total = float(tensor.sum())
    read = mapped_bytes()
    page_out([tensor])
    assert read - mapped_bytes() > 0.9 * tensor.nbytes
    assert float(tensor.sum()) == total
    assert torch.equal(tensor, weight)


def test_paging_out_changes_no_tensor_with_memory_of_its_own():
    tensors = [torch.randn(1 << 20), torch.randn(3), torch.empty(0), torch.randn(64, 64).t()]
    before = [one.clone() for one in tensors]
    page_out([*tensors, torch.empty(9, device="meta")])
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_modules_hold_the_same_parameters_after_a_stay_elsewhere():
    module = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
    module.append(module[1])  # shared
    before = list(tensors_of(module))
    with on_device(module.modules(), "meta"):
        assert all(tensor.is_meta for tensor in tensors_of(module))
        assert module[2].weight is module[1].weight
        assert isinstance(module[1].weight, nn.Parameter)
    assert len(before) == 7
    assert all(now is then for now, then in zip(tensors_of(module), before, strict=True))


def test_they_come_back_after_an_error_too():
    module = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="stop"), on_device(module.modules(), "meta"):
        raise RuntimeError("stop")
    assert not any(tensor.is_meta for tensor in tensors_of(module))


def test_moved_converts_floating_tensors_wherever_they_lie():
    value = {"x": [torch.ones(2, dtype=torch.bfloat16), (torch.ones(2, dtype=torch.long), "text")], "none": None}
    result = to_device(value, "cpu", dtype=torch.float32)
    assert (result["x"][0].dtype, result["x"][1][0].dtype) == (torch.float32, torch.long)
    assert (result["x"][1][1], result["none"]) == ("text", None)
    assert to_device(value, "cpu")["x"][0] is value["x"][0]
