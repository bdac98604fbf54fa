"""Packed linears whose scales, biases, low-rank weights and clips are learned once more."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s2q.core.schemes import LinearScheme, PerGroup, QuantScheme
from s2q.core.stored_form import stored_values
from s2q.nn import LearnableClip, PackedLinear, RefinedLinear, StudentInput
from s2q.nn.fp4 import split_scale
from s2q.rounding import round_rtn
from schemes import scheme


def a_layer(layer_scheme, *, bias=True, rank=None, clip=True):
    """A packed linear of 24 by 10 features and the way of its input."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(10, 24, generator=generator)
    inputs, basis, module = {}, None, None
    if rank is not None:
        basis = stored_values("low_rank_basis", torch.linalg.qr(torch.randn(24, rank, generator=generator))[0])
        inputs |= {"low_rank_basis": basis, "low_rank_weight": torch.randn(10, rank, generator=generator).bfloat16()}
    if clip and layer_scheme.activation is not None:
        module = LearnableClip((1,))
        nn.init.constant_(module.theta, 2.0)
        inputs["activation_clip"] = module().detach()
    packed = PackedLinear.from_rounded(
        round_rtn(weight, layer_scheme.weight),
        bias=torch.randn(10, generator=generator) if bias else None,
        scheme=layer_scheme,
        inputs=inputs,
    )
    source = StudentInput(layer_scheme.activation, low_rank_basis=None if basis is None else basis.float(), clip=module)
    return packed, source


CASES = [
    (scheme(), {"rank": 4}),
    (scheme(group_size=8), {"bias": False}),
    (scheme(activation=None), {"rank": 2}),
    (scheme(activation=4), {"clip": False}),
]
X = torch.randn(6, 24, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("layer_scheme", "parts"), CASES)
def test_it_starts_as_the_packed_linear_and_comes_back_as_it(layer_scheme, parts):
    packed, source = a_layer(layer_scheme, **parts)
    refined = RefinedLinear(packed, source=source)
    torch.testing.assert_close(refined(X), packed(X), rtol=1e-4, atol=1e-4)
    again = refined.repacked()
    assert again.path == packed.path
    for name, tensor in packed.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize(("layer_scheme", "parts"), CASES)
def test_what_was_learned_is_in_the_packed_linear_and_its_codes_stand_still(layer_scheme, parts):
    packed, source = a_layer(layer_scheme, **parts)
    refined = RefinedLinear(packed, source=source)
    with torch.no_grad():
        for parameter in refined.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    again = refined.repacked()
    torch.testing.assert_close(again(X), refined(X), rtol=1e-2, atol=2e-2)  # the branch is stored in bf16
    changed = {
        name for name, tensor in packed.state_dict().items() if not torch.equal(again.state_dict()[name], tensor)
    }
    expected = set(packed.state_dict()) - {"weight", "low_rank_basis"}
    assert changed == expected
    assert [tensor.dtype for tensor in again.parameters()] == [tensor.dtype for tensor in packed.parameters()]


def test_group_scales_of_nvfp4_are_known_from_what_was_learned():
    """s · Δ is stored; Δ is found again from the largest product of a row, which is 448 Δ."""
    grouping = QuantScheme(num_bits=4, granularity=PerGroup(group_size=16), levels="nvfp4")
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    layer_scheme = LinearScheme(weight=grouping, activation=None)
    packed = PackedLinear.from_rounded(round_rtn(weight, grouping), bias=None, scheme=layer_scheme)
    refined = RefinedLinear(packed, source=StudentInput(None))
    assert torch.equal(refined.repacked().weight_scale, packed.weight_scale)
    with torch.no_grad():
        refined.scale_change.add_(0.3 * torch.randn(64, 1, generator=torch.Generator().manual_seed(1)))
    again = refined.repacked()
    (before, row_before), (of_groups, row) = split_scale(packed.weight_scale), split_scale(again.weight_scale)
    assert torch.equal(of_groups.float(), before.float())
    assert torch.equal(of_groups.float() * row, again.weight_scale)
    assert int((row != row_before).sum()) > 48
    torch.testing.assert_close(row, row_before * refined.scale_change.exp(), rtol=2**-4, atol=0)
    refined.weight_scale().sum().backward()
    expected = (refined.scale_change.detach().exp() * packed.weight_scale).sum(dim=1, keepdim=True)
    torch.testing.assert_close(refined.scale_change.grad, expected)


def test_the_gradients_are_those_of_the_formula():
    packed, source = a_layer(scheme(activation=None), rank=2)
    refined = RefinedLinear(packed, source=source)
    refined(X).square().sum().backward()
    weight = packed.dequantized_weight(torch.float32)
    basis, branch = packed.low_rank_basis.float(), packed.low_rank_weight.float()
    coefficients = X @ basis
    rest = X - coefficients @ basis.t()
    change = torch.zeros(10, requires_grad=True)
    offset = torch.zeros(10, requires_grad=True)
    output = F.linear(rest, weight * change.exp()[:, None], packed.bias + offset) + coefficients @ branch.t()
    output.square().sum().backward()
    torch.testing.assert_close(refined.scale_change.grad, change.grad, rtol=1e-4, atol=1e-3)
    unit = weight.square().sum(dim=1).mean().sqrt()
    torch.testing.assert_close(refined.bias_change.grad, offset.grad * unit, rtol=1e-4, atol=1e-3)
    assert bool((refined.branch_change.grad != 0).any())


def test_it_makes_up_for_an_error_of_scale_and_bias():
    packed, source = a_layer(scheme(activation=None), clip=False)
    wanted = F.linear(X, packed.dequantized_weight(torch.float32) * 1.1, packed.bias + 0.5)
    refined = nn.Sequential(RefinedLinear(packed, source=source))
    optimizer = torch.optim.Adam(refined.parameters(), lr=0.02)
    for _ in range(200):
        loss = (refined(X) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    error = refined[0].repacked()(X) - wanted
    assert float(error.square().mean() / wanted.square().mean()) < 2**-16  # a scale has eight bits
