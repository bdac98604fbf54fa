"""EvalCrafter's five figures (Liu et al. 2024) that the paper reports: which are there, and what the others need."""

from collections.abc import Mapping
from typing import Any

_DOVER = (
    "needs DOVER, which is a repository and weights of its own; run EvalCrafter's VQA script on the videos that "
    "--vbench-python keeps"
)
NEEDS: Mapping[str, str] = {
    "clipsim": "needs a CLIP model: --clip FOLDER",
    "clip_temp": "needs a CLIP model: --clip FOLDER, and more than one frame",
    "vqa_a": _DOVER,
    "vqa_t": _DOVER,
    "flow_score": "needs RAFT, which VBench brings: --vbench-python PYTHON with flow_score among --vbench-dims",
}
"""The five, and what each cannot be computed without."""


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
    return scores | {"absent": {name: need for name, need in NEEDS.items() if name not in scores}}
