import itertools
import math

import numpy as np
import pytest
import scipy.stats

from s2q.evaluation.definitions import directions
from s2q.evaluation.intervals import holm, sign_flip_p_value
from s2q.evaluation.paired import compare_group, paired_differences
from s2q.evaluation.video_metrics import METRICS


def videos(values, *, metric="ssim", seeds=2, spread=0.0):
    """One metric of each prompt's videos: the prompt's value, moved a little by the seed."""
    return [
        {"prompt": f"p{i}", "seed": seed, "metrics": {metric: value + spread * seed, "reference_x": 1.0}}
        for i, value in enumerate(values)
        for seed in range(seeds)
    ]


def evaluation(values, *, metric="ssim"):
    mean = float(np.mean(values))
    return {"metrics": {metric: {"mean": mean}}, "videos": videos(values, metric=metric)}


def test_holm_equals_an_example_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3 · 0.01, 2 · 0.03, then no smaller
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def test_the_p_value_is_that_of_all_sign_patterns():
    differences = [0.3, -0.1, 0.8, 0.4, 0.05, -0.2, 0.6, 0.9, 0.1, 0.35]
    observed = abs(sum(differences))
    patterns = list(itertools.product((1, -1), repeat=10))
    extreme = sum(
        abs(sum(s * d for s, d in zip(pattern, differences, strict=True))) >= observed - 1e-12 for pattern in patterns
    )
    assert sign_flip_p_value(differences) == pytest.approx(extreme / 1024)


@pytest.mark.parametrize("count", [10, 13, 14, 32, 100])
@pytest.mark.parametrize("data", ["normal", "shifted", "ties"])
def test_the_p_value_is_that_of_scipy(count, data):
    rng = np.random.default_rng(count)
    if data == "ties":
        drawn = rng.integers(-1, 3, count).astype(float)
    else:
        drawn = rng.normal({"normal": 0.0, "shifted": 0.5}[data], size=count)
    settings = {"permutation_type": "samples", "n_resamples": 9999, "rng": np.random.default_rng(0)}
    expected = scipy.stats.permutation_test((drawn,), np.mean, **settings)
    assert sign_flip_p_value(drawn.tolist()) == expected.pvalue


def test_the_p_value_is_uniform_where_nothing_differs():
    rng = np.random.default_rng(0)
    found = [sign_flip_p_value(rng.normal(size=12).tolist()) for _ in range(200)]
    assert 0.02 < np.mean(np.array(found) < 0.1) < 0.18


def test_no_p_value_and_no_interval_below_ten_prompts():
    one = paired_differences(videos([1.0] * 9), videos([0.5] * 9))["ssim"]
    assert (one.estimate, one.low, one.high, one.p, one.p_holm) == (0.5, None, None, None, None)
    assert one.larger() is None


def test_differences_are_paired_by_prompt_and_seed():
    """Prompts differ by far more than the models do; shuffled videos give the same."""
    base = [float(100 * i) for i in range(12)]
    better = videos([value + 1.0 for value in base], spread=5.0)
    worse = videos(base, spread=5.0)
    one = paired_differences(better, worse[::-1])["ssim"]
    assert one.estimate == pytest.approx(1.0)
    assert one.low > 0.99
    assert one.larger() == "a"
    assert one.p == pytest.approx(2 / 2**12)


def test_videos_of_a_prompt_are_no_independent_draws():
    rng = np.random.default_rng(1)
    base, other = rng.normal(size=12), rng.normal(size=12)
    few = paired_differences(videos(base, seeds=1), videos(other, seeds=1))["ssim"]
    many = paired_differences(videos(base, seeds=40), videos(other, seeds=40))["ssim"]
    assert (few.low, few.high, few.p) == pytest.approx((many.low, many.high, many.p), rel=1e-3)
    assert many.n_prompts == 12


def test_velocity_errors_are_compared_by_their_ratio():
    values = [10.0**-i for i in range(1, 13)]
    a = videos([2 * value for value in values], metric="velocity_relative_error")
    b = videos(values, metric="velocity_relative_error")
    one = paired_differences(a, b)["velocity_relative_error"]
    assert one.kind == "ratio"
    assert (one.estimate, one.low, one.high) == pytest.approx((2.0, 2.0, 2.0))
    back = paired_differences(b, a)["velocity_relative_error"]
    assert back.estimate == pytest.approx(0.5)
    uneven = [{**video, "metrics": dict(video["metrics"])} for video in a]
    for index, video in enumerate(uneven):
        video["metrics"]["velocity_relative_error"] *= 1.1 if index % 4 < 2 else 4.0
    mean = math.exp((math.log(2.2) + math.log(8.0)) / 2)
    assert paired_differences(uneven, b)["velocity_relative_error"].estimate == pytest.approx(mean)


def test_a_ratio_to_nothing_is_none():
    exact = videos([0.0] * 12, metric="velocity_relative_error")
    one = paired_differences(videos([0.1] * 12, metric="velocity_relative_error"), exact)["velocity_relative_error"]
    assert (one.estimate, one.p, one.larger()) == (None, None, None)


def test_p_values_are_corrected_across_the_metrics_of_a_pair():
    rng = np.random.default_rng(2)
    a, b = videos([0.0] * 12), videos([0.0] * 12)
    for index, (one, other) in enumerate(zip(a, b, strict=True)):
        one["metrics"] |= {"noise": rng.normal(), "adherence_all_change": 1.0, "psnr_pooled_db": 30.0 + index % 3}
        other["metrics"] |= {"noise": rng.normal(), "adherence_all_change": 0.0, "psnr_pooled_db": 29.0}
    found = paired_differences(a, b)
    assert set(found) == {"ssim", "noise", "psnr_pooled_db"}, "what repeats another metric is not a test of its own"
    by_hand = holm([found[name].p for name in found])
    assert [one.p_holm for one in found.values()] == pytest.approx(by_hand)
    assert found["psnr_pooled_db"].p_holm == pytest.approx(3 * found["psnr_pooled_db"].p)


def test_a_winner_beats_every_other_one_of_its_group():
    rng = np.random.default_rng(3)
    base = 0.5 + 0.1 * rng.normal(size=16)
    good, level = base + 0.02 + 0.001 * rng.normal(size=16), base + 0.02 + 0.001 * rng.normal(size=16)
    alone = compare_group({"bad": evaluation(base), "good": evaluation(good)})
    assert alone["ranked_by"] == "ssim"
    assert alone["ranking"] == ["good", "bad"]
    assert alone["winners"]["ssim"] == {"best": "good", "winner": "good", "tied_with": []}
    three = compare_group({"bad": evaluation(base), "good": evaluation(good), "level": evaluation(level)})
    verdict = three["winners"]["ssim"]
    assert verdict["winner"] is None
    assert {verdict["best"], *verdict["tied_with"]} == {"good", "level"}
    assert len(three["differences"]) == 3
    assert three["ranking"][-1] == "bad"


def test_lower_is_better_for_errors_whatever_the_order():
    low, high = [0.01 + 0.0001 * i for i in range(12)], [0.02 + 0.0001 * i for i in range(12)]
    name = "velocity_relative_error"
    for order in (("low", "high"), ("high", "low")):
        given = {"low": evaluation(low, metric=name), "high": evaluation(high, metric=name)}
        found = compare_group({label: given[label] for label in order})
        assert found["ranking"] == ["low", "high"]
        assert found["winners"][name]["winner"] == "low"
        assert found["differences"][0]["estimate"] < 1


def test_no_winner_below_ten_prompts_or_among_equals_or_without_a_direction():
    few = compare_group({"a": evaluation([0.9] * 9), "b": evaluation([0.1] * 9)})
    assert few["winners"]["ssim"] == {"best": "a", "winner": None, "tied_with": ["b"]}
    same = compare_group({"a": evaluation([0.5] * 12), "b": evaluation([0.5] * 12)})
    assert same["winners"]["ssim"]["tied_with"] == ["b"]
    unknown = compare_group({"a": evaluation([0.9] * 12, metric="new"), "b": evaluation([0.1] * 12, metric="new")})
    assert unknown["winners"] == {}
    assert unknown["differences"][0]["p"] < 0.05
    one = compare_group({"a": evaluation([0.9] * 12)})
    assert (one["ranking"], one["winners"], one["differences"]) == (["a"], {}, [])


def test_every_metric_has_a_direction_unless_it_is_best_in_the_middle():
    assert set(METRICS) - set(directions()) == {"motion_ratio", "speed_ratio"}
