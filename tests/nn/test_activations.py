"""Activations of a quantized model are looked up, with the bits of those that are not."""

import copy

import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import nn

from s2q.nn import PackedLinear, look_up_activations, replace_module
from s2q.ops import bf16_table
from s2q.ops.bf16_table import LEAST
from s2q.ops.fused import passes
from s2q.rounding.rtn import round_rtn
from schemes import scheme
from tiny import tiny_pipeline

pytestmark = pytest.mark.skipif(passes() is None, reason="needs a C compiler")
WIDTH = 256


@pytest.fixture
def tables(monkeypatch):
    used, whole = [], bf16_table._table
    monkeypatch.setattr(bf16_table, "_table", lambda name: used.append(name) or whole(name))
    return used


def packed(model):
    """The same model with packed linears."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            rounded = round_rtn(module.weight.detach().float(), scheme(4, 8).weight)
            layer = PackedLinear.from_rounded(rounded, bias=module.bias, scheme=scheme(4, 8), dtype=torch.bfloat16)
            replace_module(model, name, layer)
    return model


@pytest.mark.parametrize(
    ("function", "table"),
    [("gelu-approximate", "gelu tanh"), ("gelu", "gelu"), ("swiglu", "silu"), ("geglu", None)],
)
@torch.no_grad()
def test_feed_forwards_of_diffusers(function, table, tables):
    torch.manual_seed(0)
    plain = packed(FeedForward(WIDTH, activation_fn=function).bfloat16())
    changed = copy.deepcopy(plain)
    assert look_up_activations(changed) == (0 if table is None else 1)
    x = torch.randn(1, LEAST // WIDTH, WIDTH).bfloat16()
    assert torch.equal(changed(x), plain(x))
    assert tables == [] if table is None else set(tables) == {table}


@torch.no_grad()
def test_modules_of_pytorch_and_copies_of_a_model(tables):
    model = packed(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(approximate="tanh"), nn.SiLU(), nn.GELU()).bfloat16())
    x = torch.randn(LEAST // WIDTH, WIDTH).bfloat16()
    expected = model(x)
    assert look_up_activations(model) == 3
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert tables == ["gelu tanh", "silu", "gelu"]


def test_a_model_in_full_precision_and_activations_in_place_stay():
    assert look_up_activations(FeedForward(WIDTH, activation_fn="gelu")) == 0
    model = packed(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(inplace=True)).bfloat16())
    assert look_up_activations(model) == 0


@torch.no_grad()
def test_an_adapter_on_the_linear_is_added_before_the_activation(tables):
    """The output of the linear inside of diffusers' module is that of the adapter too."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = packed(nn.Sequential(FeedForward(WIDTH, activation_fn="gelu-approximate")).bfloat16())
    changed = copy.deepcopy(model)
    assert look_up_activations(changed) == 1
    adapted = []
    for one in (model, changed):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules=["proj"], init_lora_weights=False)
        adapted.append(peft.inject_adapter_in_model(config, one).bfloat16())
    x = torch.randn(1, LEAST // WIDTH, WIDTH).bfloat16()
    outputs = [one(x) for one in adapted]
    assert torch.equal(*outputs)
    assert tables


def test_loaded_checkpoints_look_up(tmp_path):
    import s2q

    s2q.quantize(tiny_pipeline("hunyuanvideo", dtype=torch.bfloat16), recipe="rtn-w4a8", out=tmp_path / "out")
    transformer = s2q.load(tmp_path / "out").transformer
    changed = [name for name, module in transformer.named_modules() if {"forward", "gelu"} & vars(module).keys()]
    assert any(name.endswith("act_mlp") for name in changed)
    assert any(name.endswith("ff.net.0") for name in changed)
