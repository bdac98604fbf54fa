import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.core.codebook import levels_of
from s2q.core.qparams import RoundedWeight, code_range, dequantize_weight, weight_scale
from s2q.core.schemes import PerChannel, PerGroup, QuantScheme
from s2q.rounding import ROUNDINGS, round_rtn

GRANULARITIES = [PerChannel(), PerGroup(group_size=8), PerGroup(group_size=24)]


def a_weight(dtype=torch.float32):
    return torch.randn(6, 24, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_rtn_is_offered_by_name():
    scheme = QuantScheme(num_bits=4, granularity=PerChannel())
    ((rounded, report),) = ROUNDINGS["rtn"]().round([a_weight()], scheme, clip_ratios=[None])
    expected = round_rtn(a_weight(), scheme)
    assert torch.equal(rounded.codes, expected.codes)
    assert torch.equal(rounded.scale, expected.scale)
    assert report == {}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("num_bits", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["uniform", "lloyd_max"])
def test_no_other_codes_are_nearer(granularity, num_bits, dtype, kind):
    weight = a_weight(dtype)
    scheme = QuantScheme(num_bits=num_bits, granularity=granularity, levels=kind)
    levels = levels_of(scheme, 24)
    rounded = round_rtn(weight, scheme)
    assert isinstance(rounded, RoundedWeight)
    assert (rounded.codes.dtype, rounded.scale.dtype) == (torch.int8, torch.float32)
    error = (dequantize_weight(rounded.codes, rounded.scale, levels=levels) - weight.float()).abs()
    for step in (-1, 1):
        neighbour = (rounded.codes.int() + step).clamp(*code_range(num_bits)).to(torch.int8)
        other = (dequantize_weight(neighbour, rounded.scale, levels=levels) - weight.float()).abs()
        assert (error <= other + 1e-6).all()


def test_more_bits_and_smaller_groups_err_less():
    weight = a_weight()

    def error(num_bits, granularity):
        rounded = round_rtn(weight, QuantScheme(num_bits=num_bits, granularity=granularity))
        return (dequantize_weight(rounded.codes, rounded.scale) - weight).square().sum().item()

    by_bits = [error(num_bits, PerChannel()) for num_bits in range(2, 9)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert error(4, PerGroup(group_size=8)) < error(4, PerChannel())


def test_a_zero_weight_stays_zero():
    rounded = round_rtn(torch.zeros(3, 8), QuantScheme(num_bits=4, granularity=PerChannel()))
    assert not dequantize_weight(rounded.codes, rounded.scale).any()
    assert rounded.scale.tolist() == [1, 1, 1]


def test_clip_ratio_is_used_and_no_graph_is_kept():
    weight = a_weight().requires_grad_()
    scheme = QuantScheme(num_bits=4, granularity=PerChannel())
    rounded = round_rtn(weight, scheme, clip_ratio=0.6)
    assert torch.equal(rounded.scale, weight_scale(weight.detach(), scheme, clip_ratio=0.6))
    assert not rounded.scale.requires_grad


def test_a_group_size_that_does_not_divide_is_refused():
    with pytest.raises(InvalidInputError, match="group_size=7"):
        round_rtn(a_weight(), QuantScheme(num_bits=4, granularity=PerGroup(group_size=7)))
