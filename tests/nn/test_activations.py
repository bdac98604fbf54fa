"""Activations of a quantized model are looked up, with the bits of those that are not."""

import copy
import pickle

import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import nn

import s2q
from s2q.nn import PackedLinear, look_up_activations, replace_module, restore_activations
from s2q.ops import gelu
from s2q.ops.fused import passes
from s2q.ops.gelu import LEAST
from s2q.rounding.rtn import round_rtn
from schemes import scheme
from tiny import tiny_pipeline

pytestmark = pytest.mark.skipif(passes() is None, reason="needs a C compiler")
WIDTH = 256


@pytest.fixture
def lookups(monkeypatch):
    seen, whole = [], gelu._looked_up
    monkeypatch.setattr(gelu, "_looked_up", lambda x: seen.append(x) or whole(x))
    return seen


def packed(model):
    """The same model with packed linears."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            rounded = round_rtn(module.weight.detach().float(), scheme(4, 8).weight)
            layer = PackedLinear.from_rounded(rounded, bias=module.bias, scheme=scheme(4, 8), dtype=torch.bfloat16)
            replace_module(model, name, layer)
    return model


@pytest.mark.parametrize("function", ["gelu-approximate", "gelu", "swiglu", "geglu"])
@torch.no_grad()
def test_feed_forwards_of_diffusers(function, lookups):
    torch.manual_seed(0)
    plain = packed(FeedForward(WIDTH, activation_fn=function).bfloat16())
    changed = copy.deepcopy(plain)
    is_tanh = function == "gelu-approximate"
    assert look_up_activations(changed) == is_tanh
    x = torch.randn(1, LEAST // WIDTH, WIDTH).bfloat16()
    assert torch.equal(changed(x), plain(x))
    assert len(lookups) == is_tanh


@torch.no_grad()
def test_modules_of_pytorch_and_copies_of_a_model(lookups):
    layers = nn.Linear(WIDTH, WIDTH), nn.GELU(approximate="tanh"), nn.SiLU(), nn.GELU()
    model = packed(nn.Sequential(*layers).bfloat16())
    x = torch.randn(LEAST // WIDTH, WIDTH).bfloat16()
    expected = model(x)
    assert look_up_activations(model) == 1
    assert torch.equal(copy.deepcopy(model)(x), expected)
    activation = pickle.loads(pickle.dumps(model[1]))
    assert torch.equal(activation(model[0](x)), model[:2](x))
    assert torch.equal(model[1](input=x), nn.functional.gelu(x, approximate="tanh"))
    assert lookups
    restore_activations(model)
    assert not any({"forward", "gelu"} & vars(module).keys() for module in model.modules())


@torch.no_grad()
def test_a_model_in_full_precision_and_hooked_modules_stay():
    assert look_up_activations(FeedForward(WIDTH, activation_fn="gelu-approximate")) == 0
    model = packed(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(approximate="tanh")).bfloat16())
    model[1]._hf_hook = object()
    assert look_up_activations(model) == 0


def test_a_class_of_the_same_name_stays():
    class GELU(nn.Module):
        approximate = "tanh"

    assert look_up_activations(packed(nn.Sequential(nn.Linear(WIDTH, WIDTH), GELU()).bfloat16())) == 0


@torch.no_grad()
def test_an_adapter_on_the_linear_is_added_before_the_activation(lookups):
    """The output of the linear inside of diffusers' module is that of the adapter too."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = packed(nn.Sequential(FeedForward(WIDTH, activation_fn="gelu-approximate")).bfloat16())
    changed = copy.deepcopy(model)
    assert look_up_activations(changed) == 1
    adapted = []
    for base in (model, changed):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules=["proj"], init_lora_weights=False)
        adapted.append(peft.inject_adapter_in_model(config, base).bfloat16())
    x = torch.randn(1, LEAST // WIDTH, WIDTH).bfloat16()
    outputs = [feed_forward(x) for feed_forward in adapted]
    assert torch.equal(*outputs)
    assert lookups


def test_loaded_checkpoints_look_up_until_they_are_dequantized(tmp_path):
    pipe = tiny_pipeline("hunyuanvideo", dtype=torch.bfloat16)
    s2q.quantize(pipe, recipe="rtn-w4a8", out=tmp_path / "out")
    transformer = s2q.load(tmp_path / "out").transformer

    def changed():
        return [name for name, module in transformer.named_modules() if {"forward", "gelu"} & vars(module).keys()]

    assert any(name.endswith("act_mlp") for name in changed())
    assert any(name.endswith("ff.net.0") for name in changed())
    transformer.dequantize()
    assert changed() == []
