"""EvalCrafter's five figures (Liu et al. 2024) that the paper reports: which are there, and what the others need."""

from collections.abc import Mapping
from typing import Any

from s2q.evaluation.definitions import read_data


def evalcrafter_needs() -> dict[str, str]:
    """Return the five figures by name, and what each cannot be computed without."""
    return dict(read_data("metrics.yaml")["evalcrafter"])


def evalcrafter_scores(
    metrics: Mapping[str, Mapping[str, Any]], *, flow: Mapping[str, float] | None = None
) -> dict[str, Any] | None:
    """Collect EvalCrafter's figures from the metrics of `eval.json` and the flow score, where it was computed.

    Returns:
        Each figure of `model` and `reference`, and under `absent` what each of the others needs; None if there is none.
    """
    scores: dict[str, Any] = {}
    for name in ("clipsim", "clip_temp"):
        ours, theirs = (metrics.get(key, {}).get("mean") for key in (name, f"reference_{name}"))
        if ours is not None:
            scores[name] = {"model": ours, "reference": theirs}
    if flow is not None:
        scores["flow_score"] = dict(flow)
    if not scores:
        return None
    return scores | {"absent": {name: need for name, need in evalcrafter_needs().items() if name not in scores}}
