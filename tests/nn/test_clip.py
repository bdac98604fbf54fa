import math

import pytest
import torch
from torch import nn

from s2q.core.qparams import fake_quantize, fake_quantize_weight, token_scale, weight_scale
from s2q.core.schemes import PerChannel, PerGroup, QuantScheme
from s2q.nn import LearnableClip


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(), (5,), (5, 1)])
def test_starts_at_sigmoid_of_four_and_stays_within_zero_and_one(shape):
    clip = LearnableClip(shape)
    assert clip().shape == shape
    torch.testing.assert_close(clip(), torch.full(shape, 1 / (1 + math.exp(-4))))
    with torch.no_grad():
        clip.theta.fill_(-30)
    assert (clip() > 0).all()
    with torch.no_grad():
        clip.theta.fill_(30)
    assert (clip() <= 1).all()


def frozen_error(x, theta, *, amax, num_bits, target):
    """The straight-through definition as a smooth function of θ, in fp64.

    At θ's own value this is fake quantization; away from it, what rounding added stays as it was, and so does which
    values are clamped. Its ordinary derivative is the straight-through one.
    """
    qmax = 2 ** (num_bits - 1) - 1

    def codes(scale):
        return x / scale

    start = codes(torch.sigmoid(theta) * amax / qmax)
    residue = start.round() - start
    inside = (start.round() >= -qmax - 1) & (start.round() <= qmax)
    limit = start.round().clamp(-qmax - 1, qmax)

    def loss(shifted):
        scale = torch.sigmoid(shifted) * amax / qmax
        values = torch.where(inside, codes(scale) + residue, limit) * scale
        return (values - target).square().sum()

    return loss


def central_differences(function, theta, step=1e-5):
    gradient = torch.zeros_like(theta)
    for index in range(theta.numel()):
        shift = torch.zeros_like(theta).view(-1)
        shift[index] = step
        shift = shift.view(theta.shape)
        gradient.view(-1)[index] = (function(theta + shift) - function(theta - shift)) / (2 * step)
    return gradient


@pytest.mark.parametrize("num_bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("start", [4.0, 0.5, -1.0])
def test_gradient_towards_the_weight_ratio(num_bits, start, monkeypatch):
    monkeypatch.setattr(
        "s2q.core.qparams.stored_values", lambda name, value: value
    )  # the gradient passes over the rounding
    weight, target = draw(6, 24).double(), draw(6, 24, seed=1).double()
    clip = LearnableClip((6,))
    nn.init.constant_(clip.theta, start)
    scheme = QuantScheme(num_bits=num_bits, granularity=PerChannel())
    scale = weight_scale(weight.float(), scheme, clip_ratio=clip())
    (fake_quantize_weight(weight.float(), scale, num_bits=num_bits) - target.float()).square().sum().backward()
    theta = clip.theta.detach().double()[:, None]
    amax = weight.abs().amax(dim=1, keepdim=True)
    loss = frozen_error(weight, theta, amax=amax, num_bits=num_bits, target=target)
    expected = central_differences(loss, theta).squeeze(1)
    assert expected.abs().min() > 0
    torch.testing.assert_close(clip.theta.grad.double(), expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("num_bits", [3, 4, 6])
@pytest.mark.parametrize("start", [4.0, 0.0])
def test_gradient_towards_the_one_ratio_of_an_activation(num_bits, start):
    x, target = draw(7, 16).double(), draw(7, 16, seed=1).double()
    clip = LearnableClip()
    nn.init.constant_(clip.theta, start)
    scale = token_scale(x.float(), num_bits=num_bits, clip_ratio=clip())
    (fake_quantize(x.float(), scale, num_bits=num_bits) - target.float()).square().sum().backward()
    theta = clip.theta.detach().double()
    loss = frozen_error(x, theta, amax=x.abs().amax(dim=1, keepdim=True), num_bits=num_bits, target=target)
    torch.testing.assert_close(clip.theta.grad.double(), central_differences(loss, theta), rtol=2e-3, atol=2e-4)


def test_gradient_towards_the_input_of_a_clipped_quantizer():
    """1 within the range, 0 where clamped, and the token's largest value also moves the scale."""
    x = torch.tensor([[0.3, -1.0, 0.9, 0.1]], requires_grad=True)
    ratio = torch.tensor(0.5)
    values = fake_quantize(x, token_scale(x, num_bits=3, clip_ratio=ratio), num_bits=3)
    upstream = torch.tensor([[1.0, 0.0, 10.0, 1.0]])
    (values * upstream).sum().backward()
    # Δ = 0.5 · 1.0 / 3; codes 1.8 -> 2, -6 -> -4 (clamped), 5.4 -> 3 (clamped), 0.6 -> 1
    to_scale = 1 * (2 - 1.8) + 10 * 3 + 1 * (1 - 0.6)
    expected = torch.tensor([[1.0, -to_scale * 0.5 / 3, 0.0, 1.0]])
    torch.testing.assert_close(x.grad, expected)


def test_learning_finds_the_ratio_that_a_grid_search_finds():
    weight = draw(1, 512)
    scheme = QuantScheme(num_bits=3, granularity=PerChannel())

    def error(ratio):
        scale = weight_scale(weight, scheme, clip_ratio=ratio)
        return (fake_quantize_weight(weight, scale, num_bits=3) - weight).square().sum()

    best = min(float(error(ratio)) for ratio in torch.linspace(0.2, 1, 161))
    clip = LearnableClip((1,))
    optimizer = torch.optim.Adam(clip.parameters(), lr=5e-2)
    for _ in range(200):
        loss = error(clip())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(error(clip().detach())) < 1.03 * best < 0.9 * float(error(1.0))


def test_ratios_per_output_channel_serve_groups_too():
    weight, clip = draw(5, 24), LearnableClip((5, 1))
    scheme = QuantScheme(num_bits=4, granularity=PerGroup(group_size=8))
    scale = weight_scale(weight, scheme, clip_ratio=clip())
    assert scale.shape == (5, 3)
    scale.sum().backward()
    assert (clip.theta.grad != 0).all()
