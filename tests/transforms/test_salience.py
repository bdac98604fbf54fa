import math

import pytest
import torch
from scipy.stats import spearmanr

from s2q.common.errors import InvalidInputError
from s2q.transforms import SALIENCES, smooth_scale
from s2q.transforms.salience import spearman_salience, spearman_weights


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("ties", [False, True])
def test_weights_against_scipy(ties):
    inputs, weight = draw(6, 40), draw(40, seed=1)
    inputs[0], inputs[1] = weight**3, -weight
    if ties:
        inputs, weight = (inputs * 5).round(), (weight * 5).round()
    rho = [spearmanr(row.numpy(), weight.numpy()).statistic for row in inputs]
    expected = torch.tensor([math.exp(-one) for one in rho], dtype=torch.float64)
    torch.testing.assert_close(spearman_weights(inputs, weight), expected / expected.sum(), rtol=1e-12, atol=0)


def test_spearman_weights_equal_an_example_by_hand():
    """ρ = 1 - 6 Σ d² / (n (n² - 1)): 1 for the same order, -1 for the opposite one, ½ for one swap of neighbours."""
    weight = torch.tensor([1.0, 2.0, 3.0])
    inputs = torch.tensor([[4.0, 5.0, 6.0], [6.0, 5.0, 4.0], [2.0, 1.0, 9.0]])
    e = [math.exp(-1), math.exp(1), math.exp(-0.5)]
    eta = [one / sum(e) for one in e]
    assert spearman_weights(inputs, weight).tolist() == pytest.approx(eta)
    expected = [sum(n * row[j] for n, row in zip(eta, inputs.tolist(), strict=True)) for j in range(3)]
    assert spearman_salience(inputs, weight).tolist() == pytest.approx(expected)


def test_one_timestep_is_itself_and_the_largest_is_the_largest():
    inputs, weight = draw(1, 8), draw(8, seed=1)
    assert torch.allclose(SALIENCES["spearman"](inputs, weight), inputs[0])
    several = draw(4, 8)
    assert torch.equal(SALIENCES["max"](several, weight), several.amax(dim=0))


def test_without_an_order_all_timesteps_count_the_same():
    assert spearman_weights(draw(4, 8), torch.ones(8)).tolist() == pytest.approx([0.25] * 4)
    inputs = torch.stack([torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])])
    low = math.exp(-1) / (1 + math.exp(-1))
    assert spearman_weights(inputs, torch.tensor([1.0, 2.0, 3.0])).tolist() == pytest.approx([1 - low, low])


def test_the_balance_gives_both_sides_the_geometric_mean():
    """s̃ = √(s(x) s(W)): x times s̃ / s(x), W times s̃ / s(W)."""
    x, w = torch.tensor([16.0, 1.0, 4.0]), torch.tensor([1.0, 4.0, 9.0])
    s = smooth_scale(spearman_salience(x[None], w), w, alpha=0.5)
    balanced = torch.tensor([4.0, 2.0, 6.0], dtype=torch.float64)
    torch.testing.assert_close(x / s, balanced)
    torch.testing.assert_close(w * s, balanced)
    torch.testing.assert_close(1 / s, balanced / x)


@pytest.mark.parametrize(
    ("inputs", "weight", "message"),
    [
        (torch.ones(8), torch.ones(8), r"\[T, I\]"),
        (torch.ones(0, 8), torch.ones(8), r"\[T, I\]"),
        (torch.ones(2, 8), torch.ones(7), r"got maxima of shape \[2, 8\] and \[7\]"),
        (torch.full((2, 8), torch.nan), torch.ones(8), "NaN"),
        (torch.ones(2, 8), torch.full((8,), torch.inf), "NaN or infinite"),
    ],
)
def test_salience_refuses_bad_input(inputs, weight, message):
    with pytest.raises(InvalidInputError, match=message):
        spearman_weights(inputs, weight)
