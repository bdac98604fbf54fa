"""What the teacher's stream holds of the arguments that go through no block."""

import torch

from s2q.quantization.stream import _Distinct


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
