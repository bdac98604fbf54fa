"""What the teacher's stream holds of the arguments that go through no block."""

import pytest
import torch

from s2q.calibration import stream as stream_module
from s2q.calibration.stream import _Distinct
from s2q.common.memory import page_locked_bytes
from s2q.common.tensor_store import HostMemory, TensorStore


def test_equal_tensors_are_held_once():
    rotary = torch.randn(200, 8), torch.randn(200, 8)
    calls = [
        {"rotary": tuple(one.clone() for one in rotary), "temb": torch.full((1, 4), float(step)), "kwargs": None}
        for step in range(3)
    ]
    late = calls[1]["rotary"][0].clone()
    late[-1, -1] += 1  # far behind what is compared first
    calls.append({**calls[1], "rotary": (late, rotary[1].clone())})
    distinct = _Distinct()
    found = [distinct(call) for call in calls]
    for call, one in zip(calls, found, strict=True):
        assert one["kwargs"] is None
        assert torch.equal(one["temb"], call["temb"])
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(one["rotary"], call["rotary"], strict=True))
    assert found[0]["rotary"][0] is found[1]["rotary"][0] is found[2]["rotary"][0]
    assert found[3]["rotary"][0] is late
    assert found[3]["rotary"][1] is found[0]["rotary"][1]
    assert found[3]["temb"] is found[1]["temb"]


@pytest.mark.parametrize(("size", "taken"), [(0, 0), (1, 1), (1000, 1024), (1024, 1024), (109 << 20, 128 << 20)])
def test_page_locked_memory_is_counted_in_powers_of_two(size, taken):
    assert page_locked_bytes(size) == taken


def test_a_pinned_store_copies_once_and_takes_what_is_locked(monkeypatch, tmp_path):
    made = []

    def empty(*args, pin_memory=False, **kwargs):
        made.append(pin_memory)
        return torch.zeros(*args, **kwargs)

    monkeypatch.setattr(stream_module.torch, "empty", empty)
    memory = HostMemory(2 * 512)
    store = TensorStore(tmp_path, "one", memory=memory, pinned=True)
    tensors = {"x": torch.randn(3, 29), "y": torch.randn(1, 100).t()}  # 348 and 400 bytes
    store.put(0, tensors)
    assert (made, memory.left) == ([True, True], 0)
    assert all(torch.equal(store.get(0)[name], tensor) for name, tensor in tensors.items())
    store.put(0, {"x": tensors["x"]})
    assert memory.left == 512
    store.put(1, tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["one-0001.safetensors"]
    assert torch.equal(store.get(1)["y"], tensors["y"])
