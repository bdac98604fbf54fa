import functools
import math

import pytest
import torch
from torch import nn

from s2q.blocks.distil import (
    BlockSample,
    block_loss,
    distil,
)
from s2q.common.errors import InvalidInputError
from s2q.core.qparams import align_scale, code_range, dequantize_weight
from s2q.core.schemes import LinearScheme, PerChannel, QuantScheme
from s2q.distillation.options import Distillation
from s2q.nn import LearnableClip, StudentInput, StudentLinear
from s2q.rounding import AdaRound, LearnedRounding, penalize, round_rtn, roundings_of, soft_rounding
from s2q.rounding.adaround import rounding_penalty
from schemes import activations, weights
from tiny import ListedSamples

FOUR = weights(4)
GROUPED = weights(4, group_size=8)
TOKENS = activations(8)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_start_by_hand():
    """Δ = 7 / 7 = 1; of 2.3 the share is 0.3, sigmoid(V) = 0.4 / 1.2 = 1/3 and V = log(1/2)."""
    rounding = LearnedRounding(torch.tensor([[7.0, 2.3, -2.3, 0.5]]), FOUR)
    assert rounding.floor.tolist() == [[7, 2, -3, 0]]
    assert rounding.share()[0].tolist() == pytest.approx([0, 0.3, 0.7, 0.5], abs=1e-6)
    lowest = math.log((0.1 / 1.2) / (1.1 / 1.2))
    assert rounding.logits[0].tolist() == pytest.approx([lowest, math.log(0.5), math.log(2), 0], abs=1e-5)
    assert rounding().tolist() == [[7, 2, -2, 1]]
    assert rounding.undecided() == pytest.approx(0.75)


@pytest.mark.parametrize("scheme", [FOUR, GROUPED], ids=str)
def test_it_starts_as_the_weight_itself_and_decides_for_the_nearest(scheme):
    weight = draw(12, 24)
    rounding = LearnedRounding(weight, scheme)
    with soft_rounding([rounding]):
        _, steps = align_scale(weight, rounding.scale)
        limits = (steps * bound for bound in code_range(4))  # of the stored scale, which is rounded to bfloat16
        grouped = weight.reshape(*steps.shape[:-1], -1)
        torch.testing.assert_close(rounding(), grouped.clamp(*limits).view(12, 24), rtol=0, atol=1e-6)
    nearest = round_rtn(weight, scheme)
    assert torch.equal(rounding.rounded().codes, nearest.codes)
    assert torch.equal(rounding.rounded().scale, nearest.scale)
    assert torch.equal(rounding(), dequantize_weight(nearest.codes, nearest.scale))


@pytest.mark.parametrize("scheme", [FOUR, GROUPED], ids=str)
def test_whatever_is_learned_lands_next_to_the_weight(scheme):
    weight = draw(12, 24)
    rounding = LearnedRounding(weight, scheme)
    with torch.no_grad():
        rounding.logits.copy_(5 * draw(12, 24, seed=1))
    rounded = rounding.rounded()
    spread = rounded.scale[:, None] if scheme is FOUR else rounded.scale.repeat_interleave(8, dim=1)
    ratio = (weight / spread).double()
    codes = rounded.codes.double()
    above = (rounding.logits >= 0).double()
    assert torch.equal(codes, (ratio.float().floor().double() + above).clamp(-8, 7))
    assert bool(((codes - ratio).abs() <= 1).all())


def test_penalty_by_hand():
    """At h = ¾, 2h - 1 = ½: 1 - ½² and 1 - ½⁴."""
    share = torch.tensor([0.75, 0.25, 0.5, 0.0, 1.0])
    assert float(rounding_penalty(share, 2.0)) == pytest.approx(0.75 + 0.75 + 1)
    assert float(rounding_penalty(share, 4.0)) == pytest.approx(2 * (1 - 1 / 16) + 1)


def test_beta_falls_from_20_to_2_after_the_warmup():
    options = AdaRound(warmup=0.2)
    assert options.beta(0.0) is options.beta(0.19) is None
    assert [options.beta(at) for at in (0.2, 0.6, 1.0)] == pytest.approx([20, 11, 2])


def test_the_penalty_is_a_mean_over_all_weights_that_are_learned_together():
    roundings = [LearnedRounding(draw(4, 8, seed=seed), FOUR) for seed in range(2)]
    options = AdaRound(penalty=3.0)
    penalize(roundings, 0.1, options=options)
    assert roundings[0].logits.grad is None
    penalize(roundings, 1.0, options=options)
    for rounding in roundings:
        h = rounding.share().detach()
        inside = (h > 0) & (h < 1)
        steep = 1.2 * torch.sigmoid(rounding.logits) * torch.sigmoid(-rounding.logits) * inside
        expected = -3 / 64 * 2 * (2 * h - 1) * 2 * steep
        torch.testing.assert_close(rounding.logits.grad[inside], expected.detach()[inside], rtol=1e-4, atol=1e-8)


def test_the_penalty_drives_every_rounding_to_0_or_1():
    rounding = LearnedRounding(draw(16, 32), FOUR)
    before = rounding.rounded().codes
    optimizer = torch.optim.AdamW(rounding.parameters(), lr=0.05, weight_decay=0.0, eps=1e-15)
    for step in range(300):
        optimizer.zero_grad()
        penalize([rounding], step / 300, options=AdaRound(warmup=0.0))
        optimizer.step()
    assert rounding.undecided() < 0.01
    assert torch.equal(rounding.rounded().codes, before)


def correlated(count, tokens=32, features=24):
    mixing = draw(4, features, seed=9)
    return [
        draw(1, tokens, 4, seed=seed) @ mixing + 0.1 * draw(1, tokens, features, seed=100 + seed)
        for seed in range(count)
    ]


class TwoLinears(nn.Module):
    """A block: two linears with something nonlinear between."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(24, 48), nn.Linear(48, 24)

    def forward(self, hidden_states):
        return hidden_states + self.down(torch.nn.functional.gelu(self.up(hidden_states)))


def a_student(*, clip=False):
    block = TwoLinears().requires_grad_(False)
    inputs = correlated(12)
    samples = ListedSamples(BlockSample(inputs={"hidden_states": x}, outputs=(block(x),)) for x in inputs)
    scheme = LinearScheme(weight=QuantScheme(num_bits=3, granularity=PerChannel()), activation=TOKENS)
    student = TwoLinears().requires_grad_(False)
    for name in ("up", "down"):
        source = StudentInput(TOKENS, clip=LearnableClip((1,)) if clip else None)
        layer = StudentLinear(getattr(block, name), scheme=scheme, source=source)
        layer.rounding = LearnedRounding(layer.folded_weight(), scheme.weight)
        setattr(student, name, layer)
    return student, samples


def learn(student, samples):
    return distil(
        student,
        samples,
        options=Distillation(epochs=20, rounding_lr=0.3),
        seed=0,
        penalty=functools.partial(penalize, roundings_of(student), options=AdaRound(penalty=10.0)),
    )


@pytest.mark.parametrize("clip", [False, True])
def test_reconstruction_beats_rounding_to_nearest(clip):
    student, samples = a_student(clip=clip)
    report = learn(student, samples[:8])
    assert report.loss < 0.6 * report.initial_loss  # 0.32 to 0.55 over 8 seeds of the block
    assert block_loss(student, samples[:8]) == report.loss  # the one kept is that of the rounded weights
    fresh, _ = a_student(clip=clip)
    assert block_loss(fresh, samples[:8]) == report.initial_loss
    assert block_loss(student, samples[8:]) < 0.7 * block_loss(fresh, samples[8:])  # inputs that it has not seen
    assert not any(rounding.soft for rounding in roundings_of(student))


def test_learning_twice_gives_the_same_bits():
    (first, samples), (second, _) = a_student(clip=True), a_student(clip=True)
    assert learn(first, samples) == learn(second, samples)
    for rounding, other in zip(roundings_of(first), roundings_of(second), strict=True):
        assert torch.equal(rounding.logits, other.logits)


def test_the_best_state_is_never_worse_than_the_nearest():
    student, samples = a_student()
    report = distil(student, samples, options=Distillation(epochs=1, rounding_lr=50.0), seed=0)
    assert report.best_epoch == 0
    assert report.loss == report.initial_loss == block_loss(student, samples)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": -1.0}, "penalty=-1.0"),
        ({"penalty": math.inf}, "finite"),
        ({"warmup": 1.0}, "warmup=1.0"),
        ({"beta_end": 30.0}, "beta_end=30.0 is above beta_start=20.0"),
        ({"beta_end": 1.0}, "above 1"),
    ],
)
def test_adaround_refuses_bad_options(options, message):
    with pytest.raises(InvalidInputError, match=message):
        AdaRound(**options)


def test_adaround_refuses_groups_that_do_not_divide():
    with pytest.raises(InvalidInputError, match="group_size"):
        LearnedRounding(draw(4, 12), GROUPED)
