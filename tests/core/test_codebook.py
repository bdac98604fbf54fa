"""Lloyd-Max codebooks against Max's table, Lloyd's iteration on samples, and the conditions of an optimum."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from s2q.common.errors import InvalidInputError
from s2q.core.codebook import levels_of, lloyd_max_levels, nearest_level
from s2q.core.schemes import PerChannel, PerGroup, PerToken, QuantScheme
from s2q.ops.fake_quantize import fake_quantize_input

LARGE = 10**7


@pytest.mark.parametrize(
    ("num_bits", "positive"),
    [
        (1, [0.7979]),
        (2, [0.4528, 1.510]),
        (3, [0.2451, 0.7560, 1.344, 2.152]),
        (4, [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733]),
    ],
)
def test_for_many_dimensions_it_is_the_table_for_a_normal_distribution(num_bits, positive):
    """Max, "Quantizing for Minimum Distortion", 1960, table I."""
    levels = lloyd_max_levels(num_bits, LARGE)
    assert levels == pytest.approx([*(-level for level in reversed(positive)), *positive], rel=5e-4)
    assert lloyd_max_levels(1, LARGE)[1] == pytest.approx(math.sqrt(2 / math.pi), rel=1e-6)


@pytest.mark.parametrize(("num_bits", "dimension"), [(2, 8), (3, 24), (4, 192)])
def test_lloyds_iteration_on_samples_comes_to_the_same_levels(num_bits, dimension):
    generator = np.random.default_rng(0)
    normal = generator.standard_normal(400_000)
    rest = generator.chisquare(dimension - 1, size=normal.size)  # of the other coordinates of a normal vector
    samples = np.sort(np.abs(normal) / np.sqrt((normal**2 + rest) / dimension))
    levels = np.quantile(samples, (np.arange(2 ** (num_bits - 1)) + 0.5) / 2 ** (num_bits - 1))
    for _ in range(2000):
        cells = np.split(samples, np.searchsorted(samples, (levels[1:] + levels[:-1]) / 2))
        levels = np.array([cell.mean() for cell in cells])
    assert lloyd_max_levels(num_bits, dimension)[2 ** (num_bits - 1) :] == pytest.approx(levels, rel=0.01)


@pytest.mark.parametrize("dimension", [2, 3, 5, 16, 192, 13824])
@pytest.mark.parametrize("num_bits", [2, 4, 6])
def test_every_level_is_the_mean_of_its_cell(num_bits, dimension):
    def density(u):
        return math.exp((dimension - 3) / 2 * math.log1p(-u * u / dimension)) if u * u < dimension else 0.0

    levels = lloyd_max_levels(num_bits, dimension)
    assert list(levels) == sorted(levels)
    assert [-level for level in reversed(levels)] == list(levels)
    half = levels[len(levels) // 2 :]
    # the density of two dimensions has a pole at the end; 30 deviations are beyond everything in the others
    bounds = [0.0, *((low + high) / 2 for low, high in zip(half, half[1:], strict=False))]
    bounds.append(min(math.sqrt(dimension) * (1 - 1e-12 * (dimension == 2)), 30.0))
    for level, low, high in zip(half, bounds[:-1], bounds[1:], strict=True):
        mass, moment = (quad(lambda u, p=p: u**p * density(u), low, high, limit=200)[0] for p in (0, 1))
        assert level == pytest.approx(moment / mass, rel=1e-4 if dimension == 2 else 1e-7)


@pytest.mark.parametrize(("num_bits", "expected"), [(2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_the_error_on_normal_values_is_that_of_the_theory_and_below_uniform_levels(num_bits, expected):
    x = torch.randn(500, 4096, generator=torch.Generator().manual_seed(num_bits))
    errors = {}
    for levels in ("uniform", "lloyd_max"):
        scheme = QuantScheme(num_bits=num_bits, granularity=PerToken(), dynamic=True, levels=levels)
        # the best there is for uniform levels: the smallest error over clip ratios
        ratios = [None] if levels == "lloyd_max" else [ratio / 20 for ratio in range(4, 21)]
        errors[levels] = min(
            float((fake_quantize_input(x, scheme, clip_ratio=ratio) - x).square().mean()) for ratio in ratios
        )
    assert errors["lloyd_max"] == pytest.approx(expected, rel=0.01)
    assert errors["lloyd_max"] < 0.9 * errors["uniform"]


def test_levels_of_a_scheme_are_for_as_many_values_as_share_a_scale():
    whole = QuantScheme(num_bits=4, granularity=PerChannel(), levels="lloyd_max")
    grouped = QuantScheme(num_bits=4, granularity=PerGroup(group_size=16), levels="lloyd_max")
    assert levels_of(whole, 192).tolist() == pytest.approx(lloyd_max_levels(4, 192))
    assert levels_of(grouped, 192).tolist() == pytest.approx(lloyd_max_levels(4, 16))
    assert levels_of(QuantScheme(num_bits=4, granularity=PerChannel()), 192) is None
    assert levels_of(whole, 192).dtype == torch.float32


def test_computed_once_and_the_same_again():
    first = lloyd_max_levels(5, 777)
    assert lloyd_max_levels(5, 777) is first
    lloyd_max_levels.cache_clear()
    assert lloyd_max_levels(5, 777) == first


def test_one_value_has_no_direction():
    with pytest.raises(InvalidInputError, match="lloyd_max levels: 1 value to a scale; expected at least 2"):
        lloyd_max_levels(4, 1)


@pytest.mark.parametrize(("num_bits", "dimension"), [(2, 64), (4, 2), (4, LARGE), (6, 3), (8, 2), (8, 192), (8, 30720)])
def test_the_nearest_level_of_many_values_is_that_of_a_search(num_bits, dimension):
    levels = torch.tensor(lloyd_max_levels(num_bits, dimension))
    bounds = (levels[1:] + levels[:-1]) / 2
    above, below = (torch.nextafter(bounds, torch.tensor(to)) for to in (torch.inf, -torch.inf))
    special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e-45])
    values = torch.cat([bounds, above, below, levels, special])
    noise = 3 * torch.randn(2**16 - len(values), generator=torch.Generator().manual_seed(num_bits))
    values = torch.cat([values, noise]).view(32, -1)
    expected = torch.bucketize(values, bounds, out_int32=True)
    assert torch.equal(nearest_level(values, levels), expected)
    assert torch.equal(nearest_level(values.T, levels), expected.T)
    compiled = torch.compile(nearest_level, fullgraph=True, backend="eager")
    assert torch.equal(compiled(values, levels), expected)
    few = torch.stack([nearest_level(row, levels) for row in values])
    assert torch.equal(few, expected)
    assert expected.dtype == few.dtype == nearest_level(values, levels).dtype
