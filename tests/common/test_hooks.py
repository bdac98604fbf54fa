import torch

from s2q.common.hooks import capture_calls


def test_calls_are_recorded_until_the_context_ends():
    linear, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    with capture_calls(linear) as calls:
        linear(x)
        linear(input=x)
    linear(x)
    assert calls == [((x,), {}), ((), {"input": x})]


def test_the_first_call_leaves_the_context_and_does_not_run_the_module():
    ran = []
    linear = torch.nn.Linear(2, 2)
    linear.register_forward_hook(lambda *_: ran.append("module"))
    with capture_calls(linear, only_first=True) as calls:
        linear(torch.ones(1, 2))
        ran.append("after")
    assert len(calls) == 1
    assert ran == []
