"""NVFP4 and MXFP4: levels, scales, schemes."""

import math

import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.core.codebook import levels_of
from s2q.core.fp4 import E2M1_LEVELS, block_scale
from s2q.core.qparams import dequantize_weight, quantize_weight, weight_scale
from s2q.core.schemes import LinearScheme, PerChannel, PerGroup, QuantScheme
from s2q.ops.fake_quantize import fake_quantize_input
from s2q.recipes.load import load_recipe

GROUPS = {"nvfp4": 16, "mxfp4": 32}
E2M1 = [sign * value for sign in (1, -1) for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]


def scheme(levels, *, dynamic=False, **changes):
    fields = {"num_bits": 4, "granularity": PerGroup(group_size=GROUPS[levels]), **changes}
    return QuantScheme(**fields, levels=levels, dynamic=dynamic)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def e4m3(value):
    """The nearest number of 4 bits of exponent and 3 of mantissa, by its definition; even on ties."""
    exponent = max(math.floor(math.log2(value)), -6)
    step = 2.0 ** (exponent - 3)
    return min(round(value / step) * step, 448.0)


def test_the_levels_are_those_of_e2m1():
    assert sorted(E2M1_LEVELS) == list(E2M1_LEVELS) == sorted(E2M1)
    assert levels_of(scheme("nvfp4"), 32).tolist() == list(E2M1_LEVELS)


def test_mxfp4_equals_an_example_by_hand():
    x = torch.zeros(1, 64)
    x[0, :4] = torch.tensor([7.0, 2.6, 0.2, -5.1])
    x[0, 32:34] = torch.tensor([0.04, -0.01])  # 2^-5 <= 0.04, so the scale is 2^-7: 5.1 and -1.3
    result = fake_quantize_input(x, scheme("mxfp4", dynamic=True))
    assert result[0, :4].tolist() == [6, 3, 0, -6]
    assert result[0, 32:34].tolist() == [6 / 128, -1.5 / 128]
    assert result.count_nonzero() == 5


@pytest.mark.parametrize("levels", GROUPS)
def test_scales_and_values_equal_the_definition(levels):
    weight, size = noise(6, 96) * noise(6, 1, seed=1).exp(), GROUPS[levels]
    weight[3] = 0
    scale = weight_scale(weight, scheme(levels))
    codes = quantize_weight(weight, scale, num_bits=4, levels=levels_of(scheme(levels), 96))
    result = dequantize_weight(codes, scale, levels=levels_of(scheme(levels), 96))
    for row, values in enumerate(weight.double()):
        delta = float(values.abs().max()) / (6 * 448)
        if delta:  # of four significant bits
            step = 2.0 ** (math.floor(math.log2(delta)) - 3)
            delta = round(delta / step) * step
        for group, part in enumerate(values.split(size)):
            largest = float(part.abs().max())
            if largest == 0:
                expected = 0.0
            elif levels == "nvfp4":
                top = largest == float(values.abs().max())
                expected = 448 * delta if top else min(e4m3(largest / 6 / delta), 448) * delta
            else:
                expected = 2.0 ** (math.floor(math.log2(largest)) - 2)
            assert float(scale[row, group]) == pytest.approx(expected, rel=1e-6)
            distance = (part.unsqueeze(1) - torch.tensor(E2M1) * expected).abs()
            nearest = torch.tensor(E2M1)[distance.argmin(dim=1)] * expected
            torch.testing.assert_close(result[row, group * size : (group + 1) * size], nearest, rtol=1e-5, atol=0)


@pytest.mark.parametrize("levels", GROUPS)
def test_the_gradient_goes_straight_through_the_rounding_of_the_scale(levels):
    amax = torch.tensor([[3.0, 5.0]], requires_grad=True)
    block_scale(amax, scheme(levels)).sum().backward()
    assert amax.grad.tolist() == [[pytest.approx(1 / 6)] * 2]


def test_schemes_and_recipes():
    names = {"nvfp4": "w4nvg16a4nvg16", "mxfp4": "w4mxg32a4mxg32"}
    for levels, name in names.items():
        linear = LinearScheme(weight=scheme(levels), activation=scheme(levels, dynamic=True))
        assert (linear.name, linear.simulated) == (name, True)
        assert LinearScheme.from_dict(linear.to_dict()) == linear
        group = f"granularity=per_group and group_size={GROUPS[levels]}"
        for changes in ({"granularity": PerGroup(group_size=64)}, {"granularity": PerChannel()}, {"num_bits": 3}):
            with pytest.raises(InvalidInputError, match=f"levels={levels} with .*; expected num_bits=4, {group}"):
                scheme(levels, **changes)
    with pytest.raises(InvalidInputError, match="granularity=per_group and group_size=16"):
        load_recipe("rtn-w4a16", overrides=["weights.levels=nvfp4"]).linear_scheme()
