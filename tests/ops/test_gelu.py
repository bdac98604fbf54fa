"""tanh-GELU of bf16 by a table: PyTorch's bits, for every number, and PyTorch itself where a table is no gain."""

import pytest
import torch
from torch.nn import functional as F

from s2q.ops import gelu
from s2q.ops.fused import passes
from s2q.ops.gelu import LEAST, gelu_tanh

pytestmark = pytest.mark.skipif(passes() is None, reason="needs a C compiler")


@pytest.fixture
def lookups(monkeypatch):
    """What is looked up."""
    seen, whole = [], gelu._looked_up
    monkeypatch.setattr(gelu, "_looked_up", lambda x: seen.append(x) or whole(x))
    return seen


def every_number():
    """All bf16 numbers but NaN, infinities too, in a random order and in whole vectors."""
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    numbers = numbers[~numbers.isnan()]
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))
    return torch.cat([numbers[order], numbers[order]])[: (1 << 16)].view(64, 1024)


def test_every_number_has_the_bits_of_pytorch(lookups):
    x = every_number()
    found, expected = gelu_tanh(x), F.gelu(x, approximate="tanh")
    assert lookups
    assert torch.equal(found.isnan(), expected.isnan())
    same = ~expected.isnan()
    assert torch.equal(found.view(torch.int16)[same], expected.view(torch.int16)[same])
    assert bool(gelu_tanh(torch.full((LEAST,), torch.nan, dtype=torch.bfloat16)).isnan().all())


def test_the_end_of_a_tensor_differs_by_a_rounding_near_zero_alone(lookups):
    """PyTorch computes the last few numbers by other code."""
    x = torch.full((LEAST + 5,), -5.125, dtype=torch.bfloat16)
    found, expected = gelu_tanh(x), F.gelu(x, approximate="tanh")
    assert lookups
    assert float((found.float() - expected.float()).abs().max()) < 2e-7


@pytest.mark.parametrize(
    "changed",
    [
        lambda x: x.float(),
        lambda x: x[:3],
        lambda x: x[:, ::2],
        lambda x: x.t(),
        lambda x: x.view(2, 4, 256, 256).contiguous(memory_format=torch.channels_last),
        lambda x: x.requires_grad_(),
        lambda x: torch.nn.Parameter(x, requires_grad=False),
        lambda x: x.to("meta"),
    ],
    ids=["float32", "small", "halves of rows", "transposed", "channels last", "gradient", "subclass", "meta"],
)
def test_pytorch_computes_what_a_table_does_not(changed, lookups):
    x = changed(torch.randn(1024, 512).bfloat16())
    found, expected = gelu_tanh(x), F.gelu(x, approximate="tanh")
    assert lookups == []
    assert (found.stride(), found.requires_grad) == (expected.stride(), expected.requires_grad)
    assert x.is_meta or torch.equal(found, expected)


def test_without_passes_and_when_compiling_pytorch_computes(monkeypatch, lookups):
    x = torch.randn(256, 512).bfloat16()
    expected = F.gelu(x, approximate="tanh")
    compiled = torch.compile(gelu_tanh, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    assert torch.equal(torch.jit.trace(gelu_tanh, x, check_trace=False)(x), expected)
    monkeypatch.setattr(gelu, "passes", lambda: None)
    assert torch.equal(gelu_tanh(x), expected)
    assert lookups == []
