import math

import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.core.codebook import levels_of
from s2q.core.qparams import (
    code_range,
    dequantize,
    dequantize_weight,
    fake_quantize,
    fake_quantize_weight,
    quantize,
    quantize_weight,
    scale_from_amax,
    token_scale,
    weight_scale,
)
from s2q.core.schemes import PerChannel, PerGroup, PerToken, QuantScheme
from s2q.core.stored_form import stored_values
from s2q.ops.fake_quantize import fake_quantize_input

WIDTHS = range(2, 9)


def equation_1(value: float, scale: float, num_bits: int) -> int:
    """Eq. 1 by its words: of all representable codes the nearest, the even one of two equally near."""
    codes = range(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1))
    return min(codes, key=lambda code: (abs(value / scale - code), code % 2))


@pytest.mark.parametrize("num_bits", WIDTHS)
@pytest.mark.parametrize("scale", [1.0, 0.25, 2.0**-20, 8.0])
def test_codes_equal_a_search_over_all_codes(num_bits, scale):
    # every code, every midpoint between two, points beside the midpoints, and points beyond both ends
    steps = torch.arange(-(2 ** (num_bits - 1)) - 3, 2 ** (num_bits - 1) + 3, dtype=torch.float32)
    offsets = torch.tensor([0.0, 0.25, 0.4375, 0.5, 0.5625, 0.75])
    values = (steps[:, None] + offsets).flatten() * scale
    expected = [equation_1(value, scale, num_bits) for value in values.tolist()]
    assert quantize(values, torch.tensor(scale), num_bits=num_bits).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_bits", WIDTHS)
def test_every_half_precision_value_is_rounded_to_the_nearest_code(dtype, num_bits):
    values = torch.arange(2**16).to(torch.uint16).view(dtype)
    values = values[values.abs() <= 3]
    scale = scale_from_amax(torch.tensor(2.0), num_bits=num_bits)
    codes = quantize(values, scale, num_bits=num_bits).double()
    # exact in double: no other code is nearer than the one that was chosen
    ratio = values.double() / scale.double()
    grid = torch.arange(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1), dtype=torch.float64)
    nearest = (ratio[:, None] - grid).abs().amin(dim=1)
    assert ((ratio - codes).abs() - nearest).max() < 1e-5


@pytest.mark.parametrize("num_bits", WIDTHS)
def test_dequantized_codes_quantize_to_themselves(num_bits):
    codes = torch.arange(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1)).to(torch.int8)
    scale = torch.tensor(0.037)
    assert torch.equal(quantize(dequantize(codes, scale), scale, num_bits=num_bits), codes)


@pytest.mark.parametrize("num_bits", WIDTHS)
def test_error_is_at_most_half_a_step(num_bits):
    x = torch.randn(64, 33, generator=torch.Generator().manual_seed(num_bits))
    scale = token_scale(x, num_bits=num_bits)
    error = (dequantize(quantize(x, scale, num_bits=num_bits), scale) - x).abs()
    assert (error <= scale * 0.5 * (1 + 1e-5)).all()


@pytest.mark.parametrize("num_bits", WIDTHS)
def test_the_largest_magnitude_takes_the_largest_code(num_bits):
    scale = token_scale(torch.tensor([[-3.7, 1.0], [0.1, 3.7]]), num_bits=num_bits)
    assert scale.flatten().tolist() == pytest.approx([3.7 / (2 ** (num_bits - 1) - 1)] * 2)


@pytest.mark.parametrize("amax", [0.0, 1e-45, 5e-44])
@pytest.mark.parametrize("num_bits", WIDTHS)
def test_scale_is_never_zero(amax, num_bits):
    scale = scale_from_amax(torch.tensor([amax]), num_bits=num_bits)
    assert scale.item() > 0
    codes = quantize(torch.tensor([amax]), scale, num_bits=num_bits)
    assert math.isfinite(dequantize(codes, scale).item())
    if amax == 0:
        assert (scale.item(), codes.item()) == (1.0, 0)


def test_non_finite_magnitudes_are_not_hidden():
    scale = scale_from_amax(torch.tensor([math.nan, math.inf]), num_bits=4)
    assert scale[0].isnan()
    assert scale[1].isinf()


def test_scales_are_fp32_whatever_comes_in():
    weight = torch.randn(4, 8).bfloat16()
    assert weight_scale(weight, QuantScheme(num_bits=4, granularity=PerChannel())).dtype == torch.float32
    assert token_scale(weight.half(), num_bits=4).dtype == torch.float32


@pytest.mark.parametrize("num_bits", range(2, 9))
def test_range_holds_two_to_the_n_codes_around_zero(num_bits):
    lowest, highest = code_range(num_bits)
    assert highest - lowest + 1 == 2**num_bits
    assert lowest == -highest - 1


@pytest.mark.parametrize("granularity", [PerChannel(), PerGroup(group_size=4), PerGroup(group_size=12)])
@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_weight_is_quantized_slice_by_slice(granularity, num_bits):
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    scheme = QuantScheme(num_bits=num_bits, granularity=granularity)
    scale = weight_scale(weight, scheme)
    codes = quantize_weight(weight, scale, num_bits=num_bits)
    values = dequantize_weight(codes, scale)
    size = granularity.group_size if isinstance(granularity, PerGroup) else 12
    slices = [(row, slice(start, start + size)) for row in range(5) for start in range(0, 12, size)]
    assert scale.numel() == len(slices)
    for step, where in zip(scale.flatten(), slices, strict=True):
        assert step == stored_values("weight_scale", weight[where].abs().max() / code_range(num_bits)[1])
        assert torch.equal(codes[where], quantize(weight[where], step, num_bits=num_bits))
        assert torch.equal(values[where], codes[where].float() * step)
    assert torch.equal(fake_quantize_weight(weight, scale, num_bits=num_bits), values)


def test_weight_refuses_per_token_and_indivisible_groups():
    with pytest.raises(InvalidInputError, match="PerToken"):
        weight_scale(torch.ones(2, 4), QuantScheme(num_bits=4, granularity=PerToken()))
    with pytest.raises(InvalidInputError, match="group_size=3"):
        weight_scale(torch.ones(2, 4), QuantScheme(num_bits=4, granularity=PerGroup(group_size=3)))


@pytest.mark.parametrize("clip_ratio", [0.5, torch.tensor([0.5, 0.25, 1.0])])
def test_clip_ratio_shrinks_the_scale_and_clamps(clip_ratio):
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    scheme = QuantScheme(num_bits=4, granularity=PerChannel())
    scale = weight_scale(weight, scheme, clip_ratio=clip_ratio)
    torch.testing.assert_close(scale, weight_scale(weight, scheme) * clip_ratio)
    codes = quantize_weight(weight, scale, num_bits=4)
    assert codes.min() >= -8
    assert codes.max() <= 7
    assert codes[0].abs().max() >= 7  # the value beyond the clip sits at the end of the range


def test_token_scale_takes_a_clip_ratio():
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(token_scale(x, num_bits=6, clip_ratio=0.8), token_scale(x, num_bits=6) * 0.8)


def test_fake_quantize_rounds_half_to_even():
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.4, math.inf])
    assert fake_quantize(x, torch.tensor(1.0), num_bits=4).tolist() == [-2, 0, 0, 2, 2, 7]


def composed(x, scale, *, num_bits):
    """`fake_quantize` of autograd's own operations."""
    ratio = x / scale
    codes = ratio + (ratio.round() - ratio).detach()
    return codes.clamp(*code_range(num_bits)) * scale


@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_gradients_of_a_dynamic_scale_equal_those_of_single_operations(num_bits):
    x = torch.randn(5, 3, 12, generator=torch.Generator().manual_seed(4))
    x[0, 0] = 0
    x[1, 0, :2] = torch.tensor([9.0, -9.0])  # two largest magnitudes
    ratio, upstream = torch.full((1,), 0.7), torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    results = []
    for one_by_one in (False, True):
        inputs = [value.clone().requires_grad_() for value in (x, ratio)]
        if one_by_one:
            amax = inputs[0].abs().amax(dim=-1, keepdim=True)
            scale = scale_from_amax(amax * inputs[1], num_bits=num_bits)
            values = composed(inputs[0], scale, num_bits=num_bits)
        else:
            scale = token_scale(inputs[0], num_bits=num_bits, clip_ratio=inputs[1])
            values = fake_quantize(inputs[0], scale, num_bits=num_bits)
        (values * upstream).sum().backward()
        results.append([values.detach(), *(value.grad for value in inputs)])
    for fused, single in zip(*results, strict=True):
        torch.testing.assert_close(fused, single, rtol=1e-5, atol=1e-5)


def test_fake_quantize_gradient_towards_x_is_one_inside_and_zero_outside():
    x = torch.tensor([-9.0, -8.0, -3.3, 0.0, 7.0, 7.4, 8.1], requires_grad=True)
    fake_quantize(x, torch.tensor(1.0), num_bits=4).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 0]


def test_fake_quantize_gradient_towards_the_scale_is_that_of_lsq():
    x = torch.tensor([-9.0, -3.3, 1.4, 8.6])
    scale = torch.tensor(0.8, requires_grad=True)
    fake_quantize(x, scale, num_bits=4).sum().backward()
    ratio = x / 0.8
    expected = -8 + (ratio[1].round() - ratio[1]) + (ratio[2].round() - ratio[2]) + 7
    assert scale.grad.item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_learned_clip_ratio_gets_the_gradient_of_its_finite_difference(monkeypatch):
    monkeypatch.setattr(
        "s2q.core.qparams.stored_values", lambda name, value: value
    )  # the gradient passes over the rounding
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float32)
    scheme = QuantScheme(num_bits=4, granularity=PerChannel())

    def clamped_part(ratio: torch.Tensor) -> torch.Tensor:
        # the sum over clamped values only, where the quantizer is truly differentiable in the ratio: qmax·Δ or qmin·Δ
        scale = weight_scale(weight, scheme, clip_ratio=ratio)
        outside = (weight / scale[:, None]).abs() > 8.5
        return (fake_quantize_weight(weight, scale, num_bits=4) * outside).sum()

    ratio = torch.full((4,), 0.4, requires_grad=True)
    clamped_part(ratio).backward()
    step = 1e-3
    for row in range(4):
        nudge = torch.zeros(4)
        nudge[row] = step
        with torch.no_grad():
            slope = (clamped_part(ratio + nudge) - clamped_part(ratio - nudge)) / (2 * step)
        assert ratio.grad[row].item() == pytest.approx(slope.item(), rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fake_quantize_equals_quantize_then_dequantize(dtype):
    x = torch.randn(8, 9).to(dtype)
    scale = token_scale(x, num_bits=5, clip_ratio=0.7)
    result = fake_quantize(x, scale, num_bits=5)
    assert result.dtype == dtype
    assert torch.equal(result, dequantize(quantize(x, scale, num_bits=5), scale).to(dtype))


def codebook(num_bits=4, granularity=None):
    return QuantScheme(num_bits=num_bits, granularity=granularity or PerChannel(), levels="lloyd_max")


@pytest.mark.parametrize("granularity", [PerChannel(), PerGroup(group_size=8)])
@pytest.mark.parametrize("num_bits", WIDTHS)
def test_with_a_codebook_every_value_goes_to_the_nearest_level(num_bits, granularity):
    weight = torch.randn(6, 24, generator=torch.Generator().manual_seed(num_bits))
    scheme = codebook(num_bits, granularity)
    levels = levels_of(scheme, 24)
    scale = weight_scale(weight, scheme)
    parts = {PerChannel: (6, 24), PerGroup: (6, 3, 8)}[type(granularity)]
    expected = weight.double().reshape(parts).square().mean(dim=-1).sqrt()
    torch.testing.assert_close(scale.double().reshape(expected.shape), expected, rtol=2**-8, atol=0)
    codes = quantize_weight(weight, scale, num_bits=num_bits, levels=levels)
    ratio = (weight.double().reshape(parts) / scale.double().reshape(expected.shape).unsqueeze(-1)).reshape(6, 24)
    distance = (ratio[..., None] - levels.double()).abs()
    chosen = distance.gather(-1, (codes.long() + 2 ** (num_bits - 1))[..., None])[..., 0]
    assert float((chosen - distance.amin(dim=-1)).max()) < 1e-6
    values = dequantize_weight(codes, scale, levels=levels)
    assert torch.equal(fake_quantize_weight(weight, scale, num_bits=num_bits, levels=levels), values)
    assert torch.equal(quantize_weight(values, scale, num_bits=num_bits, levels=levels), codes)


def test_a_codebook_by_hand():
    # the halves of scale 2: ratios 2.5, 1.2, 0.05, -1.5 with boundaries at -1.25, 0 and 1.25
    levels, scale = torch.tensor([-2.0, -0.5, 0.5, 2.0]), torch.tensor(2.0)
    codes = quantize(torch.tensor([5.0, 2.4, 0.1, -3.0]), scale, num_bits=2, levels=levels)
    assert codes.dtype == torch.int8
    assert codes.tolist() == [1, 0, 0, -2]
    assert dequantize(codes, scale, levels=levels).tolist() == [4, 1, 1, -4]


def test_a_codebook_has_no_zero_but_zeros_stay_zero():
    scheme = QuantScheme(num_bits=4, granularity=PerToken(), dynamic=True, levels="lloyd_max")
    x = torch.stack([torch.zeros(16), torch.ones(16), torch.full((16,), float("nan"))])
    quantized = fake_quantize_input(x, scheme)
    assert torch.equal(quantized[0], torch.zeros(16))
    assert torch.isfinite(quantized[1]).all()
    assert torch.isnan(quantized[2]).all()
    assert weight_scale(torch.zeros(2, 16), codebook()).tolist() == [0, 0]


def test_gradients_through_a_codebook():
    """Within the range 1 towards x and level - ratio towards the scale; outside 0 and the outermost level."""
    levels = levels_of(codebook(2), 10**6)
    x = torch.tensor([0.5, 5.0], requires_grad=True)
    scale = torch.ones(2, requires_grad=True)
    fake_quantize(x, scale, num_bits=2, levels=levels).sum().backward()
    assert x.grad.tolist() == [1, 0]
    assert scale.grad.tolist() == pytest.approx([0.4528 - 0.5, 1.5104], abs=1e-3)
    tokens = torch.zeros(2, 8, requires_grad=True)
    scheme = QuantScheme(num_bits=4, granularity=PerToken(), dynamic=True, levels="lloyd_max")
    fake_quantize_input(tokens, scheme).sum().backward()
    assert torch.isfinite(tokens.grad).all()
