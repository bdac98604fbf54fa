import pytest
import torch
from torch import nn

from s2q.benchmark.breakdown import CATEGORIES, breakdown
from s2q.benchmark.synthetic_blocks import random_packed_linear
from s2q.core.input_path import InputPath
from s2q.core.schemes import LinearScheme, PerChannel, PerToken, QuantScheme
from s2q.nn import packed
from s2q.planning.resolve import LinearPlan


class Model(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        x = self.norm(self.linear(x))
        return torch.nn.functional.scaled_dot_product_attention(x, x, x).sin()


def packed_linear():
    scheme = LinearScheme(
        weight=QuantScheme(num_bits=4, granularity=PerChannel()),
        activation=QuantScheme(num_bits=6, granularity=PerToken(), dynamic=True),
    )
    linear = LinearPlan(
        name="l",
        inner_name="l",
        block=0,
        role="linear",
        in_features=64,
        out_features=64,
        has_bias=True,
        scheme=scheme,
        path=InputPath(scale=True, left=8, right=8),
    )
    return random_packed_linear(linear, generator=torch.Generator(), dtype=torch.float32)


@pytest.mark.parametrize("make", [lambda: nn.Linear(64, 64), packed_linear])
@torch.no_grad()
def test_every_part_is_found_and_nothing_is_left_behind(make):
    model = Model(make())
    x = torch.randn(1, 1, 128, 64)
    before, functions = model(x), dict(vars(packed))
    shares = breakdown(lambda: model(x), model, device="cpu")
    assert tuple(shares) == CATEGORIES
    assert sum(shares.values()) == pytest.approx(1.0)
    assert all(shares[name] > 0 for name in ("gemm", "attention", "norms", "other"))
    assert (shares["activation_path"] > 0) == isinstance(model.linear, packed.PackedLinear)
    assert dict(vars(packed)) == functions
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(x), before)


@torch.no_grad()
def test_a_model_of_one_part():
    norm = nn.LayerNorm(64)
    shares = breakdown(lambda: norm(torch.zeros(4, 64)), norm, device="cpu")
    assert shares["gemm"] == shares["attention"] == shares["activation_path"] == 0.0
    assert shares["norms"] > shares["other"] >= 0.0
