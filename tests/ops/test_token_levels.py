"""Tokens in int8 levels: every backend against the definition, and a linear of them on integers."""

import pytest
import torch

from s2q.core.codebook import level_unit, levels_of
from s2q.core.schemes import LinearScheme, PerChannel, PerGroup, PerToken, QuantScheme
from s2q.nn import PackedLinear, share_inputs
from s2q.ops.fake_quantize import fake_quantize_input
from s2q.ops.token_levels import cpu, token_levels
from s2q.rounding import round_rtn

SCHEME = QuantScheme(num_bits=4, granularity=PerToken(), dynamic=True, levels="lloyd_max_int8")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "features"), [(1, 16), (7, 33), (5, 1100)])
def test_every_backend_takes_the_nearest_level(backend, rows, features, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "CHUNK", 2 * features)
    x = draw(rows, features).to(dtype)
    levels, unit = levels_of(SCHEME, features), level_unit(SCHEME, features)
    assert torch.equal(levels, levels.round())
    ratio = torch.linspace(0.5, 1, rows).unsqueeze(1)
    for clip in (None, torch.tensor([0.8]), ratio):
        values, scale = token_levels(x, levels, clip, unit=unit, backend=backend)
        wanted = x.double().square().mean(dim=1, keepdim=True).sqrt() * unit * (1 if clip is None else clip)
        torch.testing.assert_close(scale.double(), wanted, rtol=1e-5, atol=0)
        assert values.dtype == torch.int8
        distance = (x.double() / wanted - values.double()).abs()
        least = (x.double().unsqueeze(2) / wanted.unsqueeze(2) - levels.double()).abs().amin(dim=2)
        assert bool((distance < least + 1e-3).all())


def test_the_example_of_the_docstring(backend):
    levels = torch.tensor([-127.0, -38.0, 38.0, 127.0])
    values, scale = token_levels(torch.tensor([[3.0, -1.0, 1.0, -3.0]]), levels, unit=1 / 84, backend=backend)
    assert values.tolist() == [[127, -38, 38, -127]]
    assert float(scale) == pytest.approx(0.0266, rel=1e-3)


def test_tokens_of_zeros_have_a_scale_of_zero_and_rows_may_be_strided(backend):
    x = torch.cat([torch.zeros(1, 32), draw(3, 32)])
    levels, unit = levels_of(SCHEME, 32), level_unit(SCHEME, 32)
    values, scale = token_levels(x, levels, unit=unit, backend=backend)
    assert float(scale[0]) == 0
    strided = torch.cat([x, x], dim=1)[:, :32]
    assert torch.equal(token_levels(strided, levels, unit=unit, backend=backend)[0], values)
    assert token_levels(x[:0], levels, unit=unit, backend=backend)[0].shape == (0, 32)


@pytest.mark.parametrize("weight_levels", ["lloyd_max_int8", "table", "uniform"])
def test_a_linear_of_them_runs_on_integers_and_equals_fake_quantization(backend, weight_levels):
    granularity = PerGroup(group_size=16) if weight_levels == "table" else PerChannel()
    scheme = LinearScheme(
        weight=QuantScheme(num_bits=4, granularity=granularity, levels=weight_levels), activation=SCHEME
    )
    assert not scheme.simulated
    rotation = torch.linalg.qr(draw(64, 64, seed=3))[0]
    inputs = {"transform_left": rotation, "activation_clip": torch.tensor([0.9])}
    layer = PackedLinear.from_rounded(
        round_rtn(draw(24, 64, seed=1), scheme.weight), bias=draw(24, seed=2), scheme=scheme, inputs=inputs
    )
    layer.backend = backend
    x = draw(2, 5, 64)
    quantized = fake_quantize_input(x @ layer.transform_left, SCHEME, clip_ratio=torch.tensor([0.9]))
    expected = quantized @ layer.dequantized_weight().t() + layer.bias
    found = layer(x)
    assert float((found - expected).norm() / expected.norm()) < (0.01 if backend == "triton" else 1e-5)
    share_inputs(torch.nn.Sequential(layer))
    assert torch.equal(layer(x), found)
