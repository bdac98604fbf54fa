"""Means with intervals that respect how the videos were made.

Videos of one prompt resemble each other, so that prompts, not videos, are the independent draws: every interval
resamples whole prompts. Below `MIN_PROMPTS` prompts there is no interval, since a bootstrap of so few draws claims more
than it knows.
"""

import functools
import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MIN_PROMPTS = 10
CONFIDENCE = 0.95
RESAMPLES = 9999
INTERVAL = (
    f"mean over prompts of each prompt's mean over seeds; {CONFIDENCE * 100:g} % interval by bootstrap over prompts "
    f"(BCa, {RESAMPLES} resamples; exact binomial over prompts where every prompt scores 0 or every prompt 1); "
    f"null below {MIN_PROMPTS} prompts"
)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over prompts of each prompt's mean, and the ends of its 95 % interval; None where there is no interval."""

    mean: float
    low: float | None
    high: float | None


def clustered_mean(values: Mapping[str, Sequence[float]], *, proportion: bool = False, seed: int = 0) -> Estimate:
    """Average over prompts, with a bootstrap interval over prompts; without one below 10 prompts.

    The interval is SciPy's bias-corrected and accelerated bootstrap of the prompts' means (Efron and Tibshirani 1993,
    chapter 14), 9,999 resamples. Where every prompt has the same mean, resampling sees no spread: a proportion that is
    0 or 1 everywhere then gets the exact binomial interval over prompts (Clopper and Pearson 1934), anything else an
    interval of width zero.

    Args:
        values: For each prompt the values of its videos; at least one prompt, at least one value each.
        proportion: Whether the values are 0 or 1.

    Example:
        >>> clustered_mean({"a": [1.0, 3.0], "b": [4.0]})
        Estimate(mean=3.0, low=None, high=None)
    """
    assert values
    assert all(len(group) for group in values.values())
    means = np.array([float(np.mean(group)) for group in values.values()])
    mean = float(means.mean())
    if len(means) < MIN_PROMPTS:
        return Estimate(mean=mean, low=None, high=None)
    if np.ptp(means) == 0.0:
        if proportion and mean in (0.0, 1.0):
            return _exact_proportion(mean, len(means))
        return Estimate(mean=mean, low=mean, high=mean)
    low, high = _bootstrap(means, seed)
    return Estimate(mean=mean, low=low, high=high)


def _bootstrap(means: np.ndarray, seed: int) -> tuple[float, float]:
    from scipy.stats import bootstrap

    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # BCa warns and answers NaN where its acceleration is undefined
            result = bootstrap(
                (means,),
                np.mean,
                n_resamples=RESAMPLES,
                confidence_level=CONFIDENCE,
                method=method,
                rng=np.random.default_rng(seed),
            )
        low, high = (float(end) for end in result.confidence_interval)
        if np.isfinite(low) and np.isfinite(high):
            break
    return low, high


def _exact_proportion(mean: float, count: int) -> Estimate:
    from scipy.stats import binomtest

    interval = binomtest(round(mean * count), count).proportion_ci(confidence_level=CONFIDENCE, method="exact")
    return Estimate(mean=mean, low=float(interval.low), high=float(interval.high))


def sign_flip_p_value(differences: Sequence[float], *, seed: int = 0) -> float | None:
    """Test whether paired differences are centred on zero: their signs are as likely one way as the other then.

    The two-sided permutation test of the mean, as SciPy's `permutation_test` draws and counts it: every one of the 2ⁿ
    sign patterns for few differences, 9,999 random ones beyond that (Fisher 1935, section 21; Phipson and Smyth 2010
    for the one that is added to a random count). The patterns are drawn once for all differences of a length.

    The p-value is None below 10 differences, one for each prompt.

    Example:
        Ten differences of one sign: 2 of 1,024 patterns are as far from zero.

        >>> sign_flip_p_value([1.0] * 10)
        0.001953125
    """
    if len(differences) < MIN_PROMPTS:
        return None
    values = np.asarray(differences, dtype=np.float64)
    patterns, added = _sign_patterns(len(values), seed)
    means, observed = patterns @ values / len(values), values.mean()
    tolerance = 100 * np.finfo(np.float64).eps * abs(observed)
    extreme = min(np.sum(means <= observed + tolerance), np.sum(means >= observed - tolerance))
    return min(1.0, 2 * float(extreme + added) / (len(patterns) + added))


@functools.lru_cache(maxsize=4)
def _sign_patterns(count: int, seed: int) -> tuple[np.ndarray, int]:
    """Sign patterns `[patterns, count]`, and what is added to the count of extreme ones."""
    if 2**count <= RESAMPLES:
        return np.array(list(itertools.product((1.0, -1.0), repeat=count))), 0
    swapped = np.random.default_rng(seed).permuted(np.tile((0, 1), (RESAMPLES, count, 1)), axis=-1)[..., 0]
    return 1.0 - 2.0 * swapped, 1


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for being several, so that the chance of any false rejection stays at the level (Holm 1979).

    The k-th smallest of m is multiplied by m − k + 1; it is at least the one before it, at most 1. The order is kept.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(1.0, largest)
    return adjusted
