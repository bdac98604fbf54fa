import math

import pytest
import torch

from s2q.core.qparams import quantize_per_token


@pytest.mark.parametrize("num_bits", range(2, 9))
@pytest.mark.parametrize("shape", [(7,), (5, 3), (2, 3, 17), (0, 4)])
def test_every_token_is_quantized_on_its_own(num_bits, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes, scale = quantize_per_token(x, num_bits=num_bits)
    assert (codes.shape, codes.dtype) == (x.shape, torch.int8)
    assert (scale.shape, scale.dtype) == ((*shape[:-1], 1), torch.float32)
    qmax = 2 ** (num_bits - 1) - 1
    for token, token_codes, step in zip(
        x.reshape(-1, shape[-1]), codes.reshape(-1, shape[-1]), scale.reshape(-1), strict=True
    ):
        assert step == token.abs().max() / qmax
        assert torch.equal(token_codes, (token / step).round().clamp(-qmax - 1, qmax).to(torch.int8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_bits", range(2, 9))
def test_an_all_zero_token_harms_neither_itself_nor_its_neighbours(dtype, num_bits):
    x = torch.randn(3, 8).to(dtype)
    x[1] = 0
    codes, scale = quantize_per_token(x, num_bits=num_bits)
    assert scale[1].item() == 1
    assert not codes[1].any()
    assert torch.equal(codes[::2], quantize_per_token(x[::2], num_bits=num_bits)[0])
    assert scale.isfinite().all()


def test_halves_are_quantized_as_their_fp32_values():
    x = torch.randn(16, 64).bfloat16()
    for result, expected in zip(
        quantize_per_token(x, num_bits=6), quantize_per_token(x.float(), num_bits=6), strict=True
    ):
        assert torch.equal(result, expected)


def test_negative_only_and_non_contiguous_tokens():
    x = -torch.rand(9, 5).t() - 1
    codes, scale = quantize_per_token(x, num_bits=4)
    assert codes.amin(dim=1).tolist() == [-7] * 5
    assert torch.equal(scale, quantize_per_token(x.contiguous(), num_bits=4)[1])


def test_clip_ratio_clamps_the_ends():
    codes, scale = quantize_per_token(torch.tensor([[-1.0, 1.0, 0.1]]), num_bits=4, clip_ratio=0.5)
    assert codes.tolist() == [[-8, 7, 1]]
    assert scale.item() == pytest.approx(0.5 / 7)


def test_a_nan_is_not_hidden():
    codes, scale = quantize_per_token(torch.tensor([[1.0, math.nan], [1.0, 2.0]]), num_bits=4)
    assert (codes * scale)[0].isnan().all()
    assert (codes * scale)[1].isfinite().all()
