"""Attention modules that run in int8: which calls are replaced, and that nothing else changes."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s2q.common.errors import InvalidInputError
from s2q.common.log import log_once
from s2q.nn import quantize_attention, restore_attention, set_backend
from s2q.ops.int8_attention import int8_attention
from tiny import run_transformer, tiny_transformer


class Attention(nn.Module):
    """Attends to what it is given, by the options of `F.scaled_dot_product_attention`."""

    def forward(self, query, key=None, **options):
        key = query if key is None else key
        return F.scaled_dot_product_attention(query, key, key.flip(-1), **options)


@pytest.fixture
def model():
    model = nn.ModuleDict({"attn": Attention(), "other": Attention()})
    quantize_attention(model, ["attn"])
    return model


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(query, key=None, **options):
    return Attention()(query, key, **options)


X = draw(1, 2, 40, 16)


def test_calls_with_as_many_keys_as_queries_are_replaced_inside_the_named_modules(model):
    assert torch.equal(model["attn"](X), int8_attention(X, X, X.flip(-1)))
    assert torch.equal(model["attn"](X, scale=0.1), int8_attention(X, X, X.flip(-1), scale=0.1))
    mask = draw(40, 40) > 0
    assert torch.equal(model["attn"](X, attn_mask=mask), int8_attention(X, X, X.flip(-1), mask))
    assert torch.equal(model["other"](X), plain(X))
    assert torch.equal(plain(X), F.scaled_dot_product_attention(X, X, X.flip(-1)))


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"key": draw(1, 2, 6, 16)}, None),
        ({"is_causal": True}, "a causal mask"),
        ({"query": draw(1, 2, 8, 130)}, "heads of 130 features"),
        ({"query": draw(2, 40, 16)}, "queries, keys and values of different shapes"),
        ({"query": X.clone().requires_grad_()}, "a call that needs gradients"),
    ],
)
def test_other_calls_keep_full_precision_and_all_but_cross_attention_are_logged_once(model, call, reason, caplog):
    log_once.cache_clear()
    call = {"query": X} | call
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(model["attn"](**call), plain(**call))
    expected = [] if reason is None else [f"int8 attention runs in full precision: got {reason}"]
    assert [record.getMessage() for record in caplog.records] == expected


def test_a_module_that_never_calls_pytorchs_attention_is_logged(caplog):
    log_once.cache_clear()
    model = nn.ModuleDict({"attn": nn.Identity()})
    quantize_attention(model, ["attn"])
    with caplog.at_level(logging.WARNING):
        model["attn"](X)
    assert "int8 attention has no effect" in caplog.text


def test_a_call_that_fails_leaves_nothing_behind(model):
    with pytest.raises(RuntimeError):
        model["attn"](X, key=draw(1, 2, 40, 17))
    assert torch.equal(plain(X), F.scaled_dot_product_attention(X, X, X.flip(-1)))
    model["attn"].register_forward_pre_hook(lambda *_: 1 / 0, prepend=True)
    with pytest.raises(ZeroDivisionError):
        model["attn"](X)
    assert torch.equal(plain(X), F.scaled_dot_product_attention(X, X, X.flip(-1)))


class Interrupted(Attention):
    def forward(self, query, key=None, **options):
        raise KeyboardInterrupt


def test_an_interrupted_call_leaves_full_precision_outside_its_module(model):
    broken = nn.ModuleDict({"attn": Interrupted()})
    quantize_attention(broken, ["attn"])
    with pytest.raises(KeyboardInterrupt):
        broken["attn"](X)
    assert torch.equal(plain(X), F.scaled_dot_product_attention(X, X, X.flip(-1)))
    assert torch.equal(model["attn"](X), int8_attention(X, X, X.flip(-1)))
    assert torch.equal(model["other"](X), plain(X))


def test_copies_are_quantized_and_restoring_undoes_it_once_and_for_all(model):
    quantize_attention(model, ["attn"])
    again = copy.deepcopy(model)
    restore_attention(model)
    assert torch.equal(model["attn"](X), plain(X))
    assert not model["attn"]._forward_hooks
    assert torch.equal(again["attn"](X), int8_attention(X, X, X.flip(-1)))


def test_backends_reach_it_and_the_fastest_is_full_precision_without_a_kernel(model):
    set_backend(model, "triton")
    torch.testing.assert_close(model["attn"](X), int8_attention(X, X, X.flip(-1)), rtol=1e-5, atol=1e-6)
    set_backend(model, "fastest")
    assert torch.equal(model["attn"](X), plain(X))
    set_backend(model, "cpu")
    assert torch.equal(model["attn"](X), int8_attention(X, X, X.flip(-1)))


def test_a_name_without_a_module_is_refused(model):
    with pytest.raises(InvalidInputError, match="ModuleDict has no attention module 'attn1'"):
        quantize_attention(model, ["attn1"])


def test_torch_compile_traces_it_without_a_break():
    transformer = tiny_transformer("cogvideox", num_layers=1)
    full = run_transformer(transformer)
    quantize_attention(transformer, ["transformer_blocks.0.attn1"])
    wanted = run_transformer(transformer)
    assert not torch.equal(wanted, full)
    transformer.transformer_blocks[0].compile(backend="eager", fullgraph=True)
    assert torch.equal(run_transformer(transformer), wanted)
    restore_attention(transformer)


def test_unflattening_is_traced_inside_a_quantized_module():
    class Heads(Attention):
        def forward(self, x):
            return super().forward(x.unflatten(-1, (2, 8)).transpose(1, 2))

    model, x = nn.ModuleDict({"attn": Heads()}), draw(1, 40, 16)
    quantize_attention(model, ["attn"])
    compiled = torch.compile(model["attn"], backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model["attn"](x))
