"""Paired comparison of models: paired by prompt and seed, clustered by prompt.

All models generate from the same prompts and the same noise, so that what they share cancels in differences video by
video. Values whose size varies by orders of magnitude (velocity error, relative L2) are compared by their ratio: the
differences are those of logarithms. A metric has a winner only where the best model clearly beats every other one of
its group (`winner` in `data/metrics.yaml`); all else is a tie.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

from s2q.common.progress import Tick
from s2q.evaluation.definitions import directions
from s2q.evaluation.intervals import clustered_mean, holm, sign_flip_p_value

RANKED_BY = ("velocity_relative_error", "latent_relative_l2", "psnr_frame_mean_db", "ssim")
"""Ranking metrics: the first of these that was measured."""

RATIOS = ("velocity_relative_error", "latent_relative_l2")
SIGNIFICANCE = 0.05
_NOT_COMPARED = ("reference_", "adherence_all_change")


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Difference of two models in one metric, measured on `n_prompts`; see `data/metrics.yaml`.

    Attributes:
        kind: "difference" (a − b) or "ratio" (a / b).
        estimate: The difference or ratio; None where a ratio is not defined.
        low: Lower end of its interval, as `high` the upper one; None below 10 prompts, as `p` and `p_holm`.
    """

    metric: str
    kind: str
    n_prompts: int
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None

    def larger(self) -> str | None:
        """Return whose values are clearly larger, "a" or "b"; None where that is open."""
        if self.low is None or self.high is None or self.p_holm is None or self.p_holm >= SIGNIFICANCE:
            return None
        equal = 1.0 if self.kind == "ratio" else 0.0
        return "a" if self.low > equal else "b" if self.high < equal else None


def paired_differences(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
) -> dict[str, PairedDifference]:
    """Compare two models, a and b, in every metric that both have; p-values are corrected across the metrics.

    Given are the `videos` of their `eval.json`, of the same prompts and seeds.
    """
    values_of_b = {(video["prompt"], video["seed"]): video["metrics"] for video in second}
    assert values_of_b.keys() == {(video["prompt"], video["seed"]) for video in first}
    differences: dict[str, PairedDifference] = {}
    for name in _compared(first[0]["metrics"], second[0]["metrics"]):
        by_prompt: dict[str, list[tuple[float, float]]] = {}
        for video in first:
            pair = (video["metrics"][name], values_of_b[video["prompt"], video["seed"]][name])
            if None not in pair:
                by_prompt.setdefault(video["prompt"], []).append(pair)
        if by_prompt:
            differences[name] = _difference(name, by_prompt)
    tested = {name: difference.p for name, difference in differences.items() if difference.p is not None}
    for name, adjusted in zip(tested, holm(list(tested.values())), strict=True):
        differences[name] = replace(differences[name], p_holm=adjusted)
    return differences


def compare_group(evaluations: Mapping[str, Mapping[str, Any]], *, pair_done: Tick = lambda: None) -> dict[str, Any]:
    """Rank the models of one width and say where one of them is the winner.

    Args:
        evaluations: Contents of `eval.json` by label, all of the same prompts, seeds and reference; at least one.

    Returns:
        `ranked_by`, `ranking` (labels, best first), `winners` (for each metric `best`, `winner` and `tied_with`) and
        `differences` (each pair in each metric, the better-ranked model as a), JSON-ready.
    """
    means = {label: _means(evaluation) for label, evaluation in evaluations.items()}
    ranked_by = next((name for name in RANKED_BY if all(name in table for table in means.values())), None)
    ranking = list(means)
    if ranked_by is not None:
        ranking.sort(key=lambda label: _cost(ranked_by, means[label][ranked_by]))
    pairs = {}
    for a, b in combinations(ranking, 2):
        pairs[a, b] = paired_differences(evaluations[a]["videos"], evaluations[b]["videos"])
        pair_done()
    return {
        "ranked_by": ranked_by,
        "ranking": ranking,
        "winners": _winners(ranking, means, pairs),
        "differences": [
            {"a": a, "b": b, **asdict(entry)} for (a, b), differences in pairs.items() for entry in differences.values()
        ],
    }


def _difference(name: str, by_prompt: Mapping[str, Sequence[tuple[float, float]]]) -> PairedDifference:
    is_ratio = name in RATIOS
    undefined = PairedDifference(metric=name, kind="ratio" if is_ratio else "difference", n_prompts=len(by_prompt))
    if is_ratio and min(min(pair) for pairs in by_prompt.values() for pair in pairs) <= 0:
        return undefined
    differences = {
        prompt: [math.log(a / b) if is_ratio else a - b for a, b in pairs] for prompt, pairs in by_prompt.items()
    }
    estimate = clustered_mean(differences)
    ends: dict[str, Any] = {"estimate": estimate.mean, "low": estimate.low, "high": estimate.high}
    if is_ratio:
        ends = {end: None if value is None else math.exp(value) for end, value in ends.items()}
    p = sign_flip_p_value([sum(group) / len(group) for group in differences.values()])
    return replace(undefined, **ends, p=p)


def _winners(
    ranking: Sequence[str],
    means: Mapping[str, Mapping[str, float]],
    pairs: Mapping[tuple[str, str], Mapping[str, PairedDifference]],
) -> dict[str, dict[str, Any]]:
    winners: dict[str, dict[str, Any]] = {}
    for name in directions():
        labels = [label for label in ranking if name in means[label]]
        if len(labels) < 2:
            continue
        best = min(labels, key=lambda label: _cost(name, means[label][name]))
        tied = [label for label in labels if label != best and not _beats(best, label, name, pairs)]
        winners[name] = {"best": best, "winner": None if tied else best, "tied_with": tied}
    return winners


def _beats(best: str, other: str, name: str, pairs: Mapping[tuple[str, str], Mapping[str, PairedDifference]]) -> bool:
    is_first = (best, other) in pairs
    difference = pairs[(best, other) if is_first else (other, best)][name]
    return difference.larger() == ("a" if is_first == directions()[name] else "b")


def _cost(name: str, mean: float) -> float:
    return -mean if directions()[name] else mean


def _means(evaluation: Mapping[str, Any]) -> dict[str, float]:
    metrics = evaluation["metrics"]
    return {name: metrics[name]["mean"] for name in _compared(metrics) if metrics[name]["mean"] is not None}


def _compared(*tables: Mapping[str, Any]) -> list[str]:
    return [name for name in tables[0] if not name.startswith(_NOT_COMPARED) and all(name in table for table in tables)]
