"""Attention modules that run in int8: which calls are replaced, and that nothing else changes."""

import copy
import io
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from torch.overrides import _get_current_function_mode

from s2q.common.log import log_once
from s2q.nn import quantize_attention, restore_attention, set_backend
from s2q.ops.int8_attention import int8_attention
from tiny import run_transformer, tiny_transformer


class Attention(nn.Module):
    """Attends to what it is given, by the options of `F.scaled_dot_product_attention`."""

    def forward(self, query, key=None, value=None, **options):
        key = query if key is None else key
        value = key.flip(-1) if value is None else value
        return F.scaled_dot_product_attention(query, key, value, **options)


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
        ({"query": draw(2, 40, 16)}, "queries with 3 dimensions"),
        ({"query": draw(2, 2, 40, 16), "key": X}, "queries, keys and values of different shapes"),
        ({"query": draw(1, 4, 40, 16), "key": X, "enable_gqa": True}, "queries, keys and values of different shapes"),
        ({"dropout_p": 0.5}, "dropout"),
        ({"value": draw(1, 2, 40, 8)}, "queries, keys and values of different shapes"),
        ({"query": X.clone().requires_grad_()}, "a call that needs gradients"),
        ({"key": X.clone().requires_grad_(), "value": X}, "a call that needs gradients"),
        ({"value": X.clone().requires_grad_()}, "a call that needs gradients"),
    ],
)
def test_other_calls_keep_full_precision_and_all_but_cross_attention_are_logged_once(model, call, reason, caplog):
    log_once.cache_clear()
    call = {"query": X} | call
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.manual_seed(0)
            output = model["attn"](**call)
            torch.manual_seed(0)
            assert torch.equal(output, plain(**call))
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


def test_mixed_dtypes_are_left_to_pytorch_which_refuses_them(model, caplog):
    log_once.cache_clear()
    with pytest.raises(RuntimeError, match="same dtype"):
        model["attn"](X, X.bfloat16())
    assert "got queries, keys and values of different dtypes" in caplog.text


@pytest.mark.parametrize("key", [X, X.bfloat16()])
def test_autocast_casts_as_it_does_for_pytorchs_attention(model, key):
    half = X.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        output = model["attn"](X, key)
        assert output.dtype == plain(X, key).dtype == torch.bfloat16
    assert torch.equal(output, int8_attention(half, half, half.flip(-1)))


def test_shapes_are_followed_on_the_meta_device(model):
    output = model["attn"](X.to("meta"))
    assert (output.shape, output.dtype, output.device.type) == (X.shape, X.dtype, "meta")


class Interrupted(Attention):
    def forward(self, query, key=None, **options):
        raise KeyboardInterrupt


def test_an_interrupted_call_leaves_full_precision_outside_its_module(model):
    broken = nn.ModuleDict({"attn": Interrupted()})
    quantize_attention(broken, ["attn"])
    with pytest.raises(KeyboardInterrupt):
        broken["attn"](X)
    assert _get_current_function_mode() is None
    assert torch.equal(plain(X), F.scaled_dot_product_attention(X, X, X.flip(-1)))
    assert torch.equal(model["attn"](X), int8_attention(X, X, X.flip(-1)))
    assert torch.equal(model["other"](X), plain(X))


def unpickled(model):
    return pickle.loads(pickle.dumps(model))


def reloaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, unpickled, reloaded])
def test_copies_are_quantized_and_restoring_undoes_it_once_and_for_all(model, copied):
    quantize_attention(model, ["attn", "attn"])
    attention = copied(model["attn"])
    again = nn.ModuleDict({"attn": attention})
    assert type(attention) is type(model["attn"])
    restore_attention(model)
    assert type(model["attn"]) is Attention
    assert vars(model["attn"]).keys() == vars(Attention()).keys()
    assert torch.equal(model["attn"](X), plain(X))
    assert torch.equal(again["attn"](X), int8_attention(X, X, X.flip(-1)))
    restore_attention(again)
    assert torch.equal(again["attn"](X), plain(X))


def test_a_quantized_module_is_known_by_the_names_of_its_class(model):
    kind = type(model["attn"])
    assert isinstance(model["attn"], Attention)
    assert (kind.__name__, kind.__qualname__, kind.__module__) == ("Attention", "Attention", __name__)
    assert kind.__doc__ == Attention.__doc__
    assert model["attn"].state_dict() == {}


def test_offloading_hooks_run_inside_whether_they_come_before_or_after(model):
    hook = AlignDevicesHook(io_same_device=True)
    add_hook_to_module(model["attn"], hook)
    assert torch.equal(model["attn"](X), int8_attention(X, X, X.flip(-1)))
    restore_attention(model)
    assert torch.equal(model["attn"](X), plain(X))
    quantize_attention(model, ["attn"])
    assert torch.equal(model["attn"](X), int8_attention(X, X, X.flip(-1)))
    remove_hook_from_module(model["attn"])
    assert torch.equal(model["attn"](X), int8_attention(X, X, X.flip(-1)))


def test_backends_reach_it_and_the_fastest_is_full_precision_without_a_kernel(model):
    set_backend(model, "triton")
    torch.testing.assert_close(model["attn"](X), int8_attention(X, X, X.flip(-1)), rtol=1e-5, atol=1e-6)
    set_backend(model, "fastest")
    assert torch.equal(model["attn"](X), plain(X))
    set_backend(model, "cpu")
    assert torch.equal(model["attn"](X), int8_attention(X, X, X.flip(-1)))


@pytest.mark.parametrize("compiled", ["transformer_blocks.0", "transformer_blocks.0.attn1"])
def test_torch_compile_traces_it_without_a_break(compiled):
    transformer = tiny_transformer("cogvideox", num_layers=1)
    full = run_transformer(transformer)
    quantize_attention(transformer, ["transformer_blocks.0.attn1"])
    wanted = run_transformer(transformer)
    assert not torch.equal(wanted, full)
    transformer.get_submodule(compiled).compile(backend="eager", fullgraph=True)
    assert torch.equal(run_transformer(transformer), wanted)


def test_torch_compile_traces_the_casts_of_autocast(model):
    compiled = torch.compile(model["attn"], backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(X), model["attn"](X))


def test_other_processors_are_quantized_too():
    transformer = tiny_transformer("cogvideox", num_layers=1)
    quantize_attention(transformer, ["transformer_blocks.0.attn1"])
    wanted = run_transformer(transformer)
    transformer.set_attn_processor({name: type(each)() for name, each in transformer.attn_processors.items()})
    assert torch.equal(run_transformer(transformer), wanted)


def test_unflattening_is_traced_inside_a_quantized_module():
    class Heads(Attention):
        def forward(self, x):
            return super().forward(x.unflatten(-1, (2, 8)).transpose(1, 2))

    model, x = nn.ModuleDict({"attn": Heads()}), draw(1, 40, 16)
    quantize_attention(model, ["attn"])
    compiled = torch.compile(model["attn"], backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model["attn"](x))
