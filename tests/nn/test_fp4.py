"""The product of NVFP4 weights and inputs: what the GPU reads, and its refusals elsewhere. No GPU here runs it."""

from dataclasses import replace

import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.core.codebook import levels_of
from s2q.core.fp4 import E2M1_LEVELS
from s2q.core.qparams import dequantize_weight
from s2q.core.schemes import Delta, LinearScheme, PerGroup, QuantScheme
from s2q.nn import PackedLinear, set_backend
from s2q.nn.fp4 import encode, fp4_product, has_fp4, quantize_blocks, split_scale, swizzled
from s2q.rounding import round_rtn
from schemes import scheme

NVFP4 = LinearScheme(
    weight=QuantScheme(num_bits=4, granularity=PerGroup(group_size=16), levels="nvfp4"),
    activation=QuantScheme(num_bits=4, granularity=PerGroup(group_size=16), levels="nvfp4", dynamic=True),
)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(out_features=48, in_features=96):
    weight = noise(out_features, in_features)
    return PackedLinear.from_rounded(round_rtn(weight, NVFP4.weight), bias=noise(out_features), scheme=NVFP4)


def decoded(packed):
    """E2M1 values of bytes, the low half first: a sign, two bits of exponent, one of mantissa."""
    halves = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).tolist()
    return torch.tensor([[(-1) ** (half >> 3) * E2M1[half & 7] for half in row] for row in halves])


def test_codes_are_encoded_as_e2m1():
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(2, 1)
    assert decoded(encode(codes)).tolist() == [list(E2M1_LEVELS)] * 2
    assert encode(torch.tensor([[-8, 1]], dtype=torch.int8)).tolist() == [[0x1F]]


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (130, 6)])
def test_scales_are_in_tiles_of_128_rows_by_4_groups(shape):
    scale = (torch.arange(shape[0] * shape[1]) % 251).to(torch.uint8).reshape(shape).view(torch.float8_e4m3fn)
    tiles = swizzled(scale).view(torch.uint8)
    wide = -(-shape[1] // 4)
    assert len(tiles) == -(-shape[0] // 128) * 128 * wide * 4
    for row in range(shape[0]):
        for group in range(shape[1]):
            tile = row // 128 * wide + group // 4
            at = tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4
            assert tiles[at] == scale.view(torch.uint8)[row, group]
    assert int(tiles.count_nonzero()) == int(scale.view(torch.uint8).count_nonzero())


def test_what_the_gpu_multiplies_is_what_is_simulated():
    """Levels times E4M3 scales times the scales of rows are the dequantized weight and input, without error."""
    linear = layer()
    x = noise(7, 96, seed=1) * noise(7, 1, seed=2).exp()
    codes, scale = quantize_blocks(x, NVFP4.activation, clip_ratio=None)
    sides = []
    for side, side_scale in ((codes, scale), (linear.codes(), linear.weight_scale)):
        group, row = split_scale(side_scale)
        value = decoded(encode(side)).unflatten(1, (-1, 16)) * group.float().unsqueeze(2) * row.unsqueeze(2)
        sides.append(value.flatten(1))
        levels = levels_of(NVFP4.weight, 96)
        torch.testing.assert_close(sides[-1], dequantize_weight(side, side_scale, levels=levels), rtol=1e-6, atol=0)
    torch.testing.assert_close(sides[0] @ sides[1].t() + linear.bias, linear(x), rtol=1e-5, atol=1e-5)


def test_it_is_refused_without_the_hardware_and_without_nvfp4():
    linear = layer()
    linear.name = "blocks.0.ffn"
    set_backend(linear, "fp4")
    needs = "expected an NVIDIA GPU of compute capability 10.0 or newer; use backend='auto'"
    with pytest.raises(
        InvalidInputError, match=rf"blocks.0.ffn: backend 'fp4' cannot run: got a tensor on cpu; {needs}"
    ):
        linear(noise(2, 96))
    integers = PackedLinear(96, 48, bias=False, scheme=scheme(4, 6))
    with pytest.raises(InvalidInputError, match="no linear of the model has levels=nvfp4"):
        set_backend(integers, "fp4")
    set_backend(torch.nn.ModuleList([integers, linear]), "fp4")  # those that have it alone


def test_differences_from_means_are_not_left_to_the_product():
    differences = replace(NVFP4.activation, delta=Delta(cube=(2, 1, 1)))
    linear = PackedLinear(96, 48, bias=False, scheme=replace(NVFP4, activation=differences))
    assert has_fp4(layer())
    assert not has_fp4(linear)


def test_older_gpus_are_named_by_their_capability(monkeypatch):
    from s2q.ops.dispatch import fp4_obstacle

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert fp4_obstacle(torch.device("cuda")) == "got a GPU of compute capability 9.0; expected 10.0 or newer"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert fp4_obstacle(torch.device("cuda")) is None


def test_the_arguments_of_the_product(monkeypatch):
    """A stand-in for the GPU's product reads its arguments as the hardware does."""

    def product(x, w, x_scale, w_scale, *, out_dtype):
        values = []
        for side, scale in ((x, x_scale), (w.t(), w_scale)):
            level = decoded(side.view(torch.uint8))
            rows, groups = len(level), level.shape[1] // 16
            wide = -(-groups // 4)
            at = [
                [(r // 128 * wide + g // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + g % 4 for g in range(groups)]
                for r in range(rows)
            ]
            values.append((level.unflatten(1, (-1, 16)) * scale.float()[torch.tensor(at)].unsqueeze(2)).flatten(1))
        return (values[0] @ values[1].t()).to(out_dtype)

    monkeypatch.setattr("s2q.nn.fp4.fp4_obstacle", lambda device: None)
    monkeypatch.setattr(torch, "_scaled_mm", product)
    linear, x = layer(), noise(2, 5, 96, seed=1)
    output = fp4_product(linear, x).reshape(2, 5, 48)
    assert float((output - linear(x)).norm() / linear(x).norm()) < 5e-3  # of bf16
    assert linear.kept.num_bytes >= linear.weight.nbytes
    assert torch.equal(fp4_product(linear, x).reshape(2, 5, 48), output)
    linear.weight_scale.data = linear.weight_scale * 2
    doubled = fp4_product(linear, x).reshape(2, 5, 48) - linear.bias
    torch.testing.assert_close(doubled, 2 * (output - linear.bias), rtol=1e-5, atol=1e-5)  # not those kept before
    with pytest.raises(InvalidInputError, match="expected in features in multiples of 32 and out features of 16"):
        fp4_product(layer(out_features=50), x)
