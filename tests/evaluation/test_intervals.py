import numpy as np
import pytest

from s2q.evaluation.intervals import MIN_PROMPTS, clustered_mean


def clusters(count: int, seed: int, *, per_prompt: int = 5) -> dict[str, list[float]]:
    """Videos of a prompt share most of their value: between-prompt spread 1, within-prompt spread 0.1."""
    rng = np.random.default_rng(seed)
    return {f"p{i}": (rng.normal() + 0.1 * rng.normal(size=per_prompt)).tolist() for i in range(count)}


def test_mean_weighs_prompts_equally():
    assert clustered_mean({"a": [0.0, 0.0, 0.0], "b": [1.0]}).mean == 0.5


def test_no_interval_below_ten_prompts():
    few, enough = clustered_mean(clusters(MIN_PROMPTS - 1, 0)), clustered_mean(clusters(MIN_PROMPTS, 0))
    assert few.low is None
    assert few.high is None
    assert enough.low < enough.mean < enough.high


def test_the_interval_covers_as_claimed_although_videos_of_a_prompt_are_alike():
    covered = 0
    for seed in range(150):
        estimate = clustered_mean(clusters(20, seed))
        covered += estimate.low <= 0.0 <= estimate.high
    assert covered / 150 > 0.88, "an interval over videos as independent draws would cover about two thirds"


def test_the_interval_is_reproducible_and_shrinks_with_more_prompts():
    assert clustered_mean(clusters(20, 3)) == clustered_mean(clusters(20, 3))
    small, large = clustered_mean(clusters(16, 1)), clustered_mean(clusters(256, 1))
    assert large.high - large.low < (small.high - small.low) / 2


def test_equal_values_have_an_interval_of_width_zero():
    same = {f"p{i}": [0.25, 0.25] for i in range(12)}
    estimate = clustered_mean(same)
    assert (estimate.low, estimate.mean, estimate.high) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_unanimous_proportion_gets_the_exact_interval(value):
    estimate = clustered_mean({f"p{i}": [value, value] for i in range(64)}, proportion=True)
    width = 1 - 0.025 ** (1 / 64)
    assert estimate.high - estimate.low == pytest.approx(width)
    assert value in (estimate.low, estimate.high)
