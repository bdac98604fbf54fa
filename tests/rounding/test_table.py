"""Rounding to a table: nearest for its scales, better than a maximum on a level, and what is multiplied."""

from dataclasses import replace

import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.core.codebook import FP8_SCALES, FP8_TABLE_NUMBER, TABLES, scaled_levels, table_and_scale
from s2q.core.packing import weight_bytes
from s2q.core.qparams import RoundedWeight
from s2q.core.schemes import LinearScheme, PerChannel, PerGroup, PerToken, QuantScheme
from s2q.core.stored_form import file_form
from s2q.nn import PackedLinear
from s2q.ops.int_matmul import cpu
from s2q.rounding import round_rtn, round_table
from s2q.rounding.gptq import round_gptq
from s2q.rounding.table import _whole

TABLE = QuantScheme(num_bits=4, granularity=PerGroup(group_size=16), levels="table")
FP8_TABLE = replace(TABLE, levels="fp8_table")
A8 = QuantScheme(num_bits=8, granularity=PerToken(), dynamic=True)


def weight(rows=24, columns=64, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def values(rounded):
    table, scale = table_and_scale(rounded.group_scale.unsqueeze(2))
    codes = rounded.codes.int().view(*rounded.group_scale.shape, -1) + 8
    return scaled_levels(torch.tensor(TABLES).flatten()[codes + 16 * table.int()], scale).flatten(1)


def test_an_exact_weight_comes_back():
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(2, 2)
    scales = torch.tensor([[31 * 4 + 1, -20 * 4], [-31 * 4 + 2, 15 * 4 + 3]], dtype=torch.int8)
    exact = values(RoundedWeight(codes=codes, scale=torch.ones(2), group_scale=scales)).float() * 0.25
    rounded = round_table(exact, TABLE)
    assert torch.equal(values(rounded).float() * rounded.scale.unsqueeze(1), exact)


def error_of(scheme, w):
    layer = PackedLinear.from_rounded(
        round_rtn(w, scheme), bias=None, scheme=LinearScheme(weight=scheme, activation=None)
    )
    return float((layer.dequantized_weight() - w).square().mean())


def test_its_error_is_that_of_the_docstring():
    w = weight(128, 512)
    uniform = QuantScheme(num_bits=4, granularity=PerGroup(group_size=16))
    assert error_of(TABLE, w) == pytest.approx(0.0035, rel=0.03)
    assert error_of(TABLE, w) < 0.5 * error_of(uniform, w)
    assert error_of(FP8_TABLE, w) == pytest.approx(0.0056, rel=0.03)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_groups_of_fp8_tables_have_its_table_and_its_scales(method):
    w = weight() * torch.logspace(-1.5, 0, 4).repeat_interleave(16)  # some groups have small scales
    w[2, :16] = 0
    rounded = round_rtn(w, FP8_TABLE)
    if method == "gptq":
        inputs = weight(200, 64, seed=1)
        rounded, _ = round_gptq([w], FP8_TABLE, hessian=inputs.t() @ inputs)[0]
    table, scale = table_and_scale(rounded.group_scale)
    assert set(table.flatten().tolist()) == {FP8_TABLE_NUMBER}
    assert len(set(scale.flatten().tolist())) > 10
    assert set(scale.flatten().tolist()) <= set(FP8_SCALES)
    assert torch.equal(scale.to(torch.float8_e4m3fn).float(), scale.float())


def test_scales_of_8_bit_floating_point_are_the_nearest():
    wanted = torch.linspace(0, 40, 4001)
    nearest = torch.tensor(FP8_SCALES).float()[(wanted.unsqueeze(1) - torch.tensor(FP8_SCALES)).abs().argmin(dim=1)]
    found = _whole(-wanted, "fp8_table")
    assert torch.equal((found - wanted).abs(), (nearest - wanted).abs())
    assert set(found.tolist()) == set(FP8_SCALES)


def test_each_code_is_the_nearest_level_of_its_scale():
    w = weight()
    rounded = round_table(w, TABLE)
    ratio = (w / rounded.scale.unsqueeze(1)).view(24, 4, 16, 1)
    table, scale = table_and_scale(rounded.group_scale)
    scaled = torch.tensor(TABLES)[table.int()].view(24, 4, 1, 16) * scale.view(24, 4, 1, 1).float() / 32
    nearest = (ratio - scaled).abs().argmin(dim=-1).flatten(1) - 8
    assert torch.equal(nearest.to(torch.int8), rounded.codes)


def test_rows_and_groups_of_zeros_stay_zeros():
    w = weight()
    w[3], w[5, 16:32] = 0, 0
    layer = PackedLinear.from_rounded(
        round_table(w, TABLE), bias=None, scheme=LinearScheme(weight=TABLE, activation=None)
    )
    dequantized = layer.dequantized_weight()
    assert not dequantized[3].any()
    assert not dequantized[5, 16:32].any()


def test_pieces_of_rows_change_nothing(monkeypatch):
    whole = round_table(weight(), TABLE)
    monkeypatch.setattr("s2q.rounding.table._PIECE", 100)
    pieces = round_table(weight(), TABLE)
    assert all(torch.equal(getattr(whole, name), getattr(pieces, name)) for name in ("codes", "scale", "group_scale"))


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("levels", ["table", "lloyd_max_int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_multiplies_the_values_in_integers(backend, levels, dtype):
    if backend == "triton":
        pytest.importorskip("triton")
    granularity = PerGroup(group_size=16) if levels == "table" else PerChannel()
    scheme = LinearScheme(weight=QuantScheme(num_bits=4, granularity=granularity, levels=levels), activation=A8)
    assert not scheme.simulated
    w, bias = weight(), weight(1, 24)[0]
    layer = PackedLinear.from_rounded(round_rtn(w, scheme.weight), bias=bias, scheme=scheme)
    layer.backend = backend
    x = weight(9, 64, seed=1).to(dtype)
    scale = x.float().abs().amax(dim=1, keepdim=True) / 127
    codes = (x.float() / scale).round().double()
    whole = layer.product_codes().double()
    assert torch.equal(layer.dequantized_weight().double(), (whole.float() * layer.weight_scale.unsqueeze(1)).double())
    expected = (codes @ whole.t()) * scale.double() * layer.weight_scale.double() + bias.double()
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.01, "atol": 0.05}
    torch.testing.assert_close(layer(x).double(), expected.to(dtype).double(), **tolerance)


def test_a_small_linear_keeps_values_prepacked_where_pairs_are_multiplied(monkeypatch):
    scheme = LinearScheme(weight=TABLE, activation=QuantScheme(num_bits=6, granularity=PerToken(), dynamic=True))
    layer = PackedLinear.from_rounded(round_rtn(weight(), TABLE), bias=None, scheme=scheme)
    x = weight(9, 64, seed=1)
    expected = layer(x)
    monkeypatch.setattr(cpu, "adds_in_32_bits", lambda: False)
    if not cpu.adds_pairs(x_bits=6, w_bits=8):
        pytest.skip("oneDNN multiplies no pairs on this CPU")
    torch.testing.assert_close(layer(x), expected)
    assert layer.kept.num_bytes == 24 * 64
    layer.weight_group_scale.neg_()
    assert not torch.allclose(layer(x), expected)


def test_stored_bytes_are_those_of_the_tensors():
    layer = PackedLinear.from_rounded(
        round_rtn(weight(), TABLE), bias=None, scheme=LinearScheme(weight=TABLE, activation=A8)
    )
    assert sum(tensor.nbytes for tensor in file_form(layer.state_dict()).values()) == weight_bytes(TABLE, 24, 64)
    assert layer.scheme.name == "w4tg16a8"


@pytest.mark.parametrize(
    "group_scale", [None, torch.zeros(24, 2, dtype=torch.int8), torch.zeros(24, 4)], ids=["none", "shape", "dtype"]
)
def test_group_scales_that_do_not_fit_are_refused(group_scale):
    rounded = round_rtn(weight(), TABLE)
    wrong = RoundedWeight(codes=rounded.codes, scale=rounded.scale, group_scale=group_scale)
    with pytest.raises(InvalidInputError, match=r"weight group scale: got .*; expected torch.int8 \[24, 4\]"):
        PackedLinear.from_rounded(wrong, bias=None, scheme=LinearScheme(weight=TABLE, activation=A8))
