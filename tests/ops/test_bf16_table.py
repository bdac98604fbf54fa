"""Activations of bf16 by a table: PyTorch's bits, for every number, and PyTorch itself where a table is no gain."""

import pytest
import torch

from s2q.ops import bf16_table
from s2q.ops.bf16_table import FUNCTIONS, LEAST, looked_up
from s2q.ops.fused import passes

pytestmark = pytest.mark.skipif(passes() is None, reason="needs a C compiler")


@pytest.fixture
def tables(monkeypatch):
    """Names of the tables that are used."""
    used, whole = [], bf16_table._table
    monkeypatch.setattr(bf16_table, "_table", lambda name: used.append(name) or whole(name))
    return used


def every_number():
    """All finite bf16 numbers and both infinities, in a random order, with a row that no vector width divides."""
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    numbers = numbers[~numbers.isnan()]
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))
    return torch.cat([numbers[order], numbers[order][: 7 * 9377 - len(numbers)]]).view(7, 9377)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_number_has_the_bits_of_pytorch(name, tables):
    x = every_number()
    assert x.numel() >= LEAST
    found, expected = looked_up(name, x), FUNCTIONS[name](x)
    assert tables == [name]
    assert torch.equal(found.isnan(), expected.isnan())
    same = ~expected.isnan()
    assert torch.equal(found.view(torch.int16)[same], expected.view(torch.int16)[same])
    assert bool(looked_up(name, torch.full((LEAST,), torch.nan, dtype=torch.bfloat16)).isnan().all())


@pytest.mark.parametrize("view", ["halves of rows", "transposed", "vector"])
def test_any_strides(view, tables):
    x = torch.randn(300, 512).bfloat16()
    x = {"halves of rows": x[:, ::2], "transposed": x.t(), "vector": x.flatten()}[view]
    found = looked_up("gelu tanh", x)
    assert tables
    assert torch.equal(found, FUNCTIONS["gelu tanh"](x))
    assert found.shape == x.shape
    assert found.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("other", ["float32", "small", "gradient", "meta", "subclass"])
def test_pytorch_computes_what_a_table_does_not(other, tables):
    x = torch.randn(256, 512).bfloat16()
    if other == "meta":
        assert looked_up("silu", x.to("meta")).device.type == "meta"
    else:
        changed = {
            "float32": lambda: x.float(),
            "small": lambda: x[:3],
            "gradient": lambda: x.requires_grad_(),
            "subclass": lambda: torch.nn.Parameter(x, requires_grad=False),
        }
        given = changed[other]()
        found = looked_up("silu", given)
        assert torch.equal(found, torch.nn.functional.silu(given))
        assert found.requires_grad == (other == "gradient")
    assert tables == []


def test_without_passes_and_when_compiling_pytorch_computes(monkeypatch, tables):
    x = torch.randn(256, 512).bfloat16()
    expected = torch.nn.functional.gelu(x)
    compiled = torch.compile(lambda value: looked_up("gelu", value), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    monkeypatch.setattr(bf16_table, "passes", lambda: None)
    assert torch.equal(looked_up("gelu", x), expected)
    assert tables == []
