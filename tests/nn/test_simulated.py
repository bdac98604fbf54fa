"""Linears that no integer kernel takes: inputs in groups, or codebooks; computed in floating point."""

import logging

import pytest
import torch
from torch import nn

from s2q.checkpoint import inspect_checkpoint, load_pipeline
from s2q.common.errors import InvalidInputError
from s2q.core.codebook import lloyd_max_levels
from s2q.core.qparams import RoundedWeight
from s2q.core.schemes import LinearScheme, PerChannel, PerGroup, PerToken, QuantScheme
from s2q.nn import PackedLinear, StudentInput, StudentLinear, share_inputs
from s2q.planning import plan
from s2q.rounding import round_rtn
from s2q.run.quantize import quantize
from tiny import run_pipeline, tiny_pipeline

GROUPED = ["activations.granularity=per_group", "activations.group_size=16"]


def scheme(group_size, *, bits=4):
    activation = QuantScheme(num_bits=bits, granularity=PerGroup(group_size=group_size), dynamic=True)
    return LinearScheme(weight=QuantScheme(num_bits=4, granularity=PerChannel()), activation=activation)


def test_a_group_of_a_token_has_a_scale_of_its_own():
    # 4 bits: a group's largest magnitude is code 7. [7, 1] keeps both; [70, 4] has a step of 10, so that 4 becomes 0.
    codes = torch.eye(4, dtype=torch.int8)
    layer = PackedLinear.from_rounded(RoundedWeight(codes=codes, scale=torch.ones(4)), bias=None, scheme=scheme(2))
    together = torch.tensor([[7.0, 1.0, 70.0, 4.0]])
    assert torch.equal(layer(together), torch.tensor([[7.0, 1.0, 70.0, 0.0]]))
    whole = LinearScheme(
        weight=layer.scheme.weight, activation=QuantScheme(num_bits=4, granularity=PerToken(), dynamic=True)
    )
    per_token = PackedLinear.from_rounded(RoundedWeight(codes=codes, scale=torch.ones(4)), bias=None, scheme=whole)
    assert torch.equal(per_token(together), torch.tensor([[10.0, 0.0, 70.0, 0.0]]))


@pytest.mark.parametrize("bits", [4, 6])
def test_equals_the_definition_in_double_behind_a_transform_and_a_clip(bits):
    generator = torch.Generator().manual_seed(bits)
    weight, bias = torch.randn(6, 24, generator=generator), torch.randn(6, generator=generator)
    rotation = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64))[0].bfloat16().float()
    ratio = torch.tensor([0.9])
    rounded = round_rtn(weight, scheme(8).weight)
    layer = PackedLinear.from_rounded(
        rounded,
        bias=bias,
        scheme=scheme(8, bits=bits),
        inputs={"transform_left": rotation, "activation_clip": ratio},
    )
    x = torch.randn(3, 5, 24, generator=generator)
    groups = (x.double() @ rotation.double()).reshape(3, 5, 3, 8)
    top = 2 ** (bits - 1) - 1
    step = groups.abs().amax(dim=-1, keepdim=True) * 0.9 / top
    quantized = ((groups / step).round().clamp(-top - 1, top) * step).reshape(3, 5, 24)
    expected = quantized @ (rounded.codes.double() * rounded.scale.double()[:, None]).t() + bias.double()
    close = (layer(x).double() - expected).abs() < 1e-4
    assert close.double().mean() > 0.97  # a value halfway between codes may fall on the other side in fp32
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_the_student_of_a_scheme_computes_what_its_packed_linear_does():
    linear = nn.Linear(24, 6)
    student = StudentLinear(linear, scheme=scheme(8), source=StudentInput(scheme(8).activation))
    rounded = round_rtn(linear.weight, scheme(8).weight)
    packed = PackedLinear.from_rounded(rounded, bias=linear.bias, scheme=scheme(8))
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(packed(x), student(x), rtol=0, atol=1e-5)


def codebooks(*, weight="lloyd_max", activation="lloyd_max"):
    inputs = QuantScheme(num_bits=4, granularity=PerToken(), dynamic=True, levels=activation or "uniform")
    return LinearScheme(
        weight=QuantScheme(num_bits=4, granularity=PerChannel(), levels=weight),
        activation=inputs if activation else None,
    )


def nearest(values, levels, *, stored=False):
    """What the levels make of rows in double, by search; the scale in bfloat16 if `stored`."""
    scale = values.square().mean(dim=-1, keepdim=True).sqrt()
    scale = scale.bfloat16().double() if stored else scale
    table = torch.tensor(levels, dtype=torch.float64)
    return table[((values / scale)[..., None] - table).abs().argmin(dim=-1)] * scale


def test_codebooks_on_both_sides_equal_the_definition_in_double():
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(6, 24, generator=generator), torch.randn(6, generator=generator)
    rounded = round_rtn(weight, codebooks().weight)
    layer = PackedLinear.from_rounded(rounded, bias=bias, scheme=codebooks())
    levels = lloyd_max_levels(4, 24)
    torch.testing.assert_close(
        layer.dequantized_weight(torch.float64), nearest(weight.double(), levels, stored=True), rtol=1e-6, atol=0
    )
    x = torch.randn(50, 24, generator=generator)
    expected = nearest(x.double(), levels) @ nearest(weight.double(), levels, stored=True).t() + bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=1e-4)
    assert layer.weight.shape == (6, 12)
    assert torch.equal(layer(torch.zeros(2, 24)), bias.expand(2, 6))


@pytest.mark.parametrize(
    ("weight", "activation"), [("lloyd_max", None), ("uniform", "lloyd_max"), ("lloyd_max", "uniform")]
)
def test_a_codebook_on_one_side_and_its_student(weight, activation):
    layer_scheme = codebooks(weight=weight, activation=activation)
    linear = nn.Linear(24, 6)
    student = StudentLinear(linear, learns_clip=True, scheme=layer_scheme, source=StudentInput(layer_scheme.activation))
    rounded = round_rtn(linear.weight, layer_scheme.weight, clip_ratio=student.clip_ratio())
    packed = PackedLinear.from_rounded(rounded, bias=linear.bias, scheme=layer_scheme)
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(1), requires_grad=True)
    torch.testing.assert_close(packed(x), student(x), rtol=0, atol=1e-5)
    student(x).square().sum().backward()
    assert student.weight_clip is not None
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in student.parameters())
    torch.testing.assert_close(packed.effective_weight(torch.float32), packed.dequantized_weight(torch.float32))


def test_widths_that_groups_do_not_divide_are_refused():
    with pytest.raises(InvalidInputError, match="in_features=24 is not divisible by group_size=7"):
        PackedLinear(24, 6, bias=False, scheme=scheme(7))
    with pytest.raises(InvalidInputError, match="not divisible by group_size=7"):
        StudentLinear(nn.Linear(24, 6), scheme=scheme(7), source=StudentInput(scheme(7).activation))


def test_plan_checkpoint_and_report_say_so(tmp_path, caplog):
    pipe = tiny_pipeline("cogvideox", num_layers=1)
    report = quantize(pipe, recipe="rtn-w4a6", out=tmp_path / "out", overrides=GROUPED)
    assert report.simulated
    assert inspect_checkpoint(tmp_path / "out").simulated
    loaded = load_pipeline(tmp_path / "out")
    block = loaded.transformer.transformer_blocks[0]
    assert block.attn1.to_q.scheme.name == "w4a6g16"
    assert share_inputs(block.attn1) == 0
    with caplog.at_level(logging.WARNING):
        first = run_pipeline(loaded)
    assert [record.message for record in caplog.records if "simulated in floating point" in record.message]
    assert bool(torch.isfinite(torch.as_tensor(first)).all())
    assert plan("shapes-cogvideox", recipe="rtn-w4a6", overrides=GROUPED).simulated
    assert not plan("shapes-cogvideox", recipe="s2q-plus-w4a6").simulated
