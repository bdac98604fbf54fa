import itertools
import math

import pytest
import torch

from s2q.common.errors import InvalidInputError, S2QError
from s2q.core.codebook import TABLES
from s2q.core.qparams import code_range, dequantize_weight, fake_quantize_rows, rounded_values, weight_scale
from s2q.core.schemes import PerChannel, QuantScheme
from s2q.rounding import round_rtn
from s2q.rounding.gptq import GPTQ
from s2q.rounding.gptq import round_gptq as round_weights
from s2q.rounding.hessian import HessianAccumulator, hessian_error
from s2q.rounding.table import RATIOS
from schemes import weights

W4 = weights(4)
GROUPED = weights(4, group_size=8)
CODEBOOK = weights(4, levels="lloyd_max")
TABLED = weights(4, group_size=8, levels="table")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens, features, *, seed=0):
    """Inputs whose channels depend on each other and differ in size, as those of real layers do."""
    mixing = draw(features, features, seed=seed + 1000) * torch.linspace(2, 0.1, features)[:, None]
    return draw(tokens, features, seed=seed) @ mixing


def round_gptq(weight, scheme, *, clip_ratio=None, **options):
    (result,) = round_weights([weight], scheme, clip_ratios=[clip_ratio], **options)
    return result


def in_tf32(x):
    """The ten bits of mantissa that a GPU's product of fp32 matrices keeps; the rest is cut off."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def hessian_of(x):
    accumulator = HessianAccumulator(x.shape[-1])
    accumulator.add(x)
    return accumulator.hessian()


def error_of(rounded, weight, hessian, *, scheme=W4):
    return float(hessian_error(rounded_values(rounded, scheme) - weight, hessian).sum())


@pytest.mark.parametrize("scheme", [W4, GROUPED, CODEBOOK, TABLED, QuantScheme(num_bits=2, granularity=PerChannel())])
def test_never_worse_than_rtn_and_mostly_much_better(scheme):
    ratios = []
    for seed in range(25):
        weight, hessian = draw(12, 24, seed=seed), hessian_of(correlated(60, 24, seed=seed))
        rounded, report = round_gptq(weight, scheme, hessian=hessian)
        rtn = round_rtn(weight, scheme)
        assert torch.equal(rounded.scale, rtn.scale)
        assert rounded.codes.dtype == torch.int8
        lowest, highest = code_range(scheme.num_bits)
        assert rounded.codes.min() >= lowest
        assert rounded.codes.max() <= highest
        assert report.error == pytest.approx(error_of(rounded, weight, hessian, scheme=scheme))
        assert report.rtn_error == pytest.approx(error_of(rtn, weight, hessian, scheme=scheme))
        assert report.error <= report.rtn_error
        assert (report.retries, report.dampening_frac, report.fallback) == (0, 0.01, None)
        ratios.append(report.error / report.rtn_error)
    assert sorted(ratios)[len(ratios) // 2] < 0.7


@pytest.mark.parametrize("scheme", [W4, GROUPED, CODEBOOK])
def test_equals_rtn_on_a_diagonal_hessian(scheme):
    weight = draw(10, 24)
    rounded, report = round_gptq(weight, scheme, hessian=torch.diag(torch.rand(24) + 0.1))
    assert torch.equal(rounded.codes, round_rtn(weight, scheme).codes)
    assert report.error == report.rtn_error


def damped(hessian):
    hessian = hessian.double()
    return hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def naive_gptq(weight, hessian, nearest):
    """Column by column with the inverse of what remains (Frantar et al., eq. 2 and 3), fp64, no blocks, no factor.

    `nearest(weight, column)` rounds a column of the updated weight.
    """
    weight, hessian, values = weight.double().clone(), damped(hessian), torch.zeros(weight.shape).double()
    for column in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[column:, column:])
        values[:, column] = nearest(weight, column)
        error = (weight[:, column] - values[:, column]) / inverse[0, 0]
        weight[:, column:] -= torch.outer(error, inverse[0])
    return values


def naive_table(row, importance):
    """The values of the codes of a group of weights over their Δ, with table and scale of the least weighted error."""
    largest, found = row[row.abs().argmax()] * 32 / 127, []
    for ratio, table in itertools.product(RATIOS, torch.tensor(TABLES).double()):
        s = (largest * ratio).round().clamp(-32, 31)
        nearest = table[(row[:, None] * 32 / (1 if s == 0 else s) - table).abs().argmin(dim=1)]
        difference = row - ((nearest * s + 16) / 32).floor()
        found.append((float((difference**2 * importance).sum()), ((table * s + 16) / 32).floor()))
    return min(found, key=lambda pair: pair[0])[1]


def nearest_of_tables(scale, hessian, *, size):
    """The nearest value of the table that a group has when its first column comes."""
    inverses = [torch.linalg.inv(damped(hessian)[i:, i:])[0, 0] for i in range(len(hessian))]
    importance, tables = 1 / torch.stack(inverses), {}

    def nearest(weight, column):
        first = column - column % size
        if column == first:
            group = weight[:, first : first + size] / scale[:, None]
            tables[first] = torch.stack([naive_table(row, importance[first : first + size]) for row in group])
        levels = tables[first] * scale[:, None]
        return levels.gather(1, (weight[:, column : column + 1] - levels).abs().argmin(dim=1, keepdim=True))[:, 0]

    return nearest


def grouped_order(diagonal, *, size):
    """Columns by falling diagonal within groups by falling mean diagonal."""
    groups = diagonal.view(-1, size)
    return [
        int(size * group + column)
        for group in groups.mean(dim=1).argsort(descending=True)
        for column in groups[group].argsort(descending=True)
    ]


@pytest.mark.parametrize("block_size", [1, 5, 24, 128])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scheme", [W4, TABLED])
def test_equals_the_equations_whatever_the_block_size(scheme, block_size, seed):
    weight, hessian = draw(9, 24, seed=seed), hessian_of(correlated(60, 24, seed=seed))
    rounded, report = round_gptq(weight, scheme, hessian=hessian, options=GPTQ(block_size=block_size))
    scale = rounded.scale.double()
    if scheme is TABLED:
        order = grouped_order(hessian.diagonal(), size=8)
        nearest = nearest_of_tables(scale, hessian[order][:, order], size=8)
    else:
        order = hessian.diagonal().argsort(descending=True)

        def nearest(weight, column):
            return (weight[:, column] / scale).round().clamp(-8, 7) * scale

    expected = naive_gptq(weight[:, order], hessian[order][:, order], nearest)
    same = ((rounded_values(rounded, scheme)[:, order] - expected).abs() < 1e-6).all(dim=1)
    assert int((~same).sum()) <= report.rtn_rows + (scheme is TABLED)  # two levels that are equally near in fp64
    assert same.sum() >= 6


def test_tables_have_the_error_of_the_docstring():
    ratios = []
    for seed in range(8):
        weight, hessian = draw(64, 192, seed=seed), hessian_of(correlated(2000, 192, seed=seed))
        of_table, report = round_gptq(weight, weights(4, group_size=16, levels="table"), hessian=hessian)
        _, uniform = round_gptq(weight, W4, hessian=hessian, clip_ratio=0.8)
        assert of_table.group_scale.shape == (64, 12)
        ratios.append(report.error / uniform.error)
    assert sum(ratios) / 8 == pytest.approx(0.34, abs=0.01)


def test_dead_columns_of_a_table_do_not_decide_its_scale():
    x, weight = correlated(60, 16), draw(8, 16)
    x[:, [3, 11]] = 0
    errors = []
    for size in (1e-3, 1, 1e3):
        rounded, report = round_gptq(weight, TABLED, hessian=hessian_of(size * x))
        assert report.dead_columns == 2
        errors.append(report.error / size**2)
        assert (rounded_values(rounded, TABLED) - weight)[:, [3, 11]].abs().max() < 0.5
    assert errors == pytest.approx([errors[1]] * 3, rel=1e-3)


@pytest.mark.parametrize("columns", [2, 3])
def test_close_to_the_best_codes_there_are(columns):
    scheme = QuantScheme(num_bits=3, granularity=PerChannel())
    grid = torch.tensor(list(itertools.product(range(-4, 4), repeat=columns)))
    reached, possible, nearest, exact = 0.0, 0.0, 0.0, 0
    for seed in range(60):
        weight, hessian = draw(1, columns, seed=seed + 500), hessian_of(correlated(10, columns, seed=seed))
        rounded, report = round_gptq(weight, scheme, hessian=hessian, options=GPTQ(dampening_frac=1e-6))
        best = float(hessian_error(grid * rounded.scale - weight, hessian).min())
        assert report.error >= best * (1 - 1e-6)
        reached, possible, nearest = reached + report.error, possible + best, nearest + report.rtn_error
        exact += report.error <= best * (1 + 1e-6)
    assert exact >= 30  # mostly the best there is
    assert reached < 4 * possible
    assert reached < 0.5 * nearest


@pytest.mark.parametrize("seed", range(10))
def test_error_bound_of_the_nearest_plane(seed):
    """Without clamping, each e_i is at most Δ/2 / U_ii, and the damped error is the sum of the e_i²."""
    weight, x = draw(6, 12, seed=seed), correlated(40, 12, seed=seed)
    hessian, scheme = hessian_of(x), QuantScheme(num_bits=8, granularity=PerChannel())
    ratio = 0.2 / weight_scale(weight, scheme)  # scales of 0.2, and 8 bits reach 25: nothing is clamped
    rounded, _ = round_gptq(weight, scheme, hessian=hessian, clip_ratio=ratio)
    order = hessian.diagonal().argsort(descending=True)
    damped = hessian.double() + 0.01 * hessian.diagonal().mean().double() * torch.eye(12)
    in_order = damped[order][:, order]
    factor = torch.linalg.cholesky(torch.linalg.inv(in_order), upper=True)
    bound = (0.1 / factor.diagonal()).square().sum() / 2
    assert (hessian_error(dequantize_weight(rounded.codes, rounded.scale) - weight, damped) <= bound * 1.001).all()


def test_dead_columns_are_rounded_to_nearest_and_do_not_disturb_the_others():
    x, weight = correlated(60, 16), draw(8, 16)
    x[:, [3, 11]] = 0
    hessian, alive = hessian_of(x), [column for column in range(16) if column not in (3, 11)]
    weight[:, [3, 11]] /= 10  # so that the scales are those of the others
    rounded, report = round_gptq(weight, W4, hessian=hessian)
    assert report.dead_columns == 2
    assert torch.equal(rounded.codes[:, [3, 11]], round_rtn(weight, W4).codes[:, [3, 11]])
    alone, _ = round_gptq(weight[:, alive], W4, hessian=hessian[alive][:, alive])
    assert torch.equal(rounded.codes[:, alive], alone.codes)


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(draw(1, 16), id="one sample"),
        pytest.param(draw(5, 16), id="fewer tokens than channels"),
        pytest.param(torch.ones(30, 16), id="constant channels"),
        pytest.param(draw(30, 1).expand(30, 16).clone(), id="equal channels"),
        pytest.param(draw(30, 16) * torch.tensor([1e4] + [1e-4] * 15), id="outlier channel"),
        pytest.param(torch.zeros(3, 16), id="all dead"),
        pytest.param(draw(30, 16) * 1e-15, id="tiny"),
    ],
)
@pytest.mark.parametrize("scheme", [W4, TABLED])
def test_singular_and_badly_scaled_hessians(x, scheme):
    weight = draw(6, 16, seed=2)
    rounded, report = round_gptq(weight, scheme, hessian=hessian_of(x))
    assert report.error <= report.rtn_error
    assert not report.fallback
    assert rounded_values(rounded, scheme).isfinite().all()


def test_a_single_direction_is_matched_almost_exactly():
    """With one token, 16 columns have one number to get right."""
    weight, x = draw(6, 16, seed=2), draw(1, 16)
    _, report = round_gptq(weight, W4, hessian=hessian_of(x), options=GPTQ(dampening_frac=1e-4))
    assert report.error < 0.02 * report.rtn_error


def test_a_zero_weight_and_a_constant_channel():
    weight = draw(4, 16)
    weight[1] = 0
    weight[2] = 0.5
    rounded, _ = round_gptq(weight, W4, hessian=hessian_of(correlated(40, 16)))
    assert not rounded.codes[1].any()
    assert rounded.scale[1] == 1
    assert (rounded.codes[2] == 7).all()


def test_clip_ratio_is_that_of_the_scale():
    weight, hessian = draw(5, 24), hessian_of(correlated(60, 24))
    ratio = torch.linspace(0.5, 1, 5)
    clipped, _ = round_gptq(weight, W4, hessian=hessian, clip_ratio=ratio)
    assert torch.equal(clipped.scale, weight_scale(weight, W4, clip_ratio=ratio))
    assert clipped.codes.min() == -8


@pytest.mark.parametrize("dampening_frac", [0.0, 0.01])
def test_a_failed_factorization_is_tried_again_with_more_dampening(dampening_frac):
    weight, hessian = draw(5, 8), hessian_of(correlated(40, 8))
    lowest = torch.linalg.eigvalsh(hessian.double())[0]
    indefinite = hessian - (lowest + 0.05 * hessian.diagonal().mean()) * torch.eye(8)
    options = GPTQ(dampening_frac=dampening_frac)
    rounded, report = round_gptq(weight, W4, hessian=indefinite.float(), options=options)
    assert report.retries >= 1
    assert report.dampening_frac > 0.05
    assert not report.fallback
    assert rounded.codes.shape == weight.shape


def test_the_fallback_happens_only_where_it_is_allowed_and_is_reported():
    weight, hopeless = draw(5, 8), torch.ones(8, 8) - 9 * torch.eye(8)
    hopeless.diagonal()[0] = 60.0
    hopeless = hopeless - 1e6 * torch.outer(*[torch.eye(8)[1]] * 2)
    with pytest.raises(S2QError, match="rounding.allow_fallback=true"):
        round_gptq(weight, W4, hessian=hopeless, options=GPTQ(allow_fallback=False))
    rounded, report = round_gptq(weight, W4, hessian=hopeless)
    assert torch.equal(rounded.codes, round_rtn(weight, W4).codes)
    assert (report.fallback, report.retries) == ("no positive definite Hessian in 5 tries", 5)
    assert report.dampening_frac is None


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_hessian_that_is_not_finite_rounds_to_nearest_only_where_it_is_allowed(bad):
    weight, hessian = draw(5, 8), hessian_of(correlated(40, 8))
    hessian[2, 3] = hessian[3, 2] = bad
    with pytest.raises(S2QError, match=r"Hessian contains NaN or infinite values.*rounding\.allow_fallback=true"):
        round_gptq(weight, W4, hessian=hessian, options=GPTQ(allow_fallback=False))
    rounded, report = round_gptq(weight, W4, hessian=hessian)
    assert torch.equal(rounded.codes, round_rtn(weight, W4).codes)
    assert report.fallback == "the Hessian contains NaN or infinite values"
    assert (report.error, report.rtn_error, report.rtn_rows) == (None, None, 5)


def test_half_precision_weights_and_no_graph():
    weight, hessian = draw(5, 24).bfloat16().requires_grad_(), hessian_of(correlated(60, 24))
    rounded, _ = round_gptq(weight, W4, hessian=hessian)
    same, _ = round_gptq(weight.detach().float(), W4, hessian=hessian)
    assert torch.equal(rounded.codes, same.codes)
    assert not rounded.scale.requires_grad


def test_nothing_that_was_passed_in_changes():
    weight, hessian = draw(5, 24), hessian_of(correlated(60, 24))
    copies = weight.clone(), hessian.clone()
    round_gptq(weight, W4, hessian=hessian)
    assert torch.equal(weight, copies[0])
    assert torch.equal(hessian, copies[1])


@pytest.mark.parametrize(
    ("weight", "hessian", "message"),
    [
        (torch.ones(2, 4), torch.eye(5), r"expected \[4, 4\]"),
        (torch.full((2, 4), torch.inf), torch.eye(4), "the weight contains NaN or infinite"),
    ],
)
def test_gptq_refuses_bad_input(weight, hessian, message):
    with pytest.raises(InvalidInputError, match=message):
        round_gptq(weight, W4, hessian=hessian)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dampening_frac": -1.0}, r"GPTQ: dampening_frac=-1\.0; expected at least 0"),
        ({"dampening_frac": math.nan}, "dampening_frac=nan; expected a finite number"),
        ({"dampening_frac": math.inf}, "dampening_frac=inf; expected a finite number"),
        ({"block_size": 0}, "block_size=0; expected at least 1"),
    ],
)
def test_gptq_refuses_bad_options(options, message):
    with pytest.raises(InvalidInputError, match=message):
        GPTQ(**options)


@pytest.mark.parametrize("scheme", [W4, GROUPED, CODEBOOK, TABLED])
def test_weights_of_one_input_share_the_factorization_and_are_rounded_as_alone(scheme, monkeypatch):
    hessian, weights = hessian_of(correlated(60, 24)), [draw(rows, 24, seed=rows) for rows in (5, 12, 7)]
    ratios = [None, torch.tensor(0.8), torch.tensor(0.9)]
    alone = [
        round_gptq(weight, scheme, hessian=hessian, clip_ratio=ratio)
        for weight, ratio in zip(weights, ratios, strict=True)
    ]
    factorize, calls = torch.linalg.cholesky_ex, []
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: calls.append(0) or factorize(matrix))
    for (rounded, report), (expected, of_expected) in zip(
        round_weights(weights, scheme, hessian=hessian, clip_ratios=ratios), alone, strict=True
    ):
        assert torch.equal(rounded.codes, expected.codes)
        assert torch.equal(rounded_values(rounded, scheme), rounded_values(expected, scheme))
        assert torch.equal(rounded.scale, expected.scale)
        assert report == of_expected
    assert len(calls) == 1


@pytest.mark.parametrize("outliers", [1, 30])
def test_products_in_tf32_change_the_error_by_less_than_a_hundredth(outliers):
    x, weight = correlated(2000, 192), draw(96, 192, seed=7)
    x[:, :4] *= outliers
    x = fake_quantize_rows(x, num_bits=6)
    exact, errors = hessian_of(x), []
    for hessian in (exact, hessian_of(in_tf32(x))):
        rounded, _ = round_gptq(weight, W4, hessian=hessian)
        errors.append(float(hessian_error(dequantize_weight(rounded.codes, rounded.scale) - weight, exact).sum()))
    assert errors[0] != errors[1] == pytest.approx(errors[0], rel=0.01)
