"""The paper's own figures (S²Q-VDiT, arXiv 2508.04016v3), from `data/paper.yaml`; none was measured by this project."""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any

import yaml

FULL_PRECISION = "full precision"
METHOD = "S²Q-VDiT"


def paper_tables() -> dict[str, dict[str, Any]]:
    """Return the tables by name: `title`, `comparable`, `metrics`, `prompts`, `claims`, `values`; some `scores`."""
    tables: dict[str, dict[str, Any]] = _content()["tables"]
    return tables


def paper_model(model: str) -> str | None:
    """Return the paper's name of a model, None if it has no figures of it."""
    for name, ids in _content()["models"].items():
        if model.lower() in (one.lower() for one in ids):
            return str(name)
    return None


def published_scores(model: str, scheme: str) -> dict[str, dict[str, float]]:
    """Return the scores of VBench and EvalCrafter that the paper reports.

    Args:
        scheme: What the linears are quantized to, "w4a6".

    Returns:
        By method (`full precision`, `S²Q-VDiT`, the paper's baselines), the score by the name that `eval.json` has for
        it: per cent for VBench's dimensions, EvalCrafter's own units. Full precision has its scores under any scheme.
        Empty if the paper has none.
    """
    name = paper_model(model)
    scores: dict[str, dict[str, float]] = {}
    for table in paper_tables().values():
        for method, values in table["values"].get(name, {}).items() if "scores" in table else ():
            if method == FULL_PRECISION or table["scheme"] == scheme:
                scores.setdefault(method, {}).update(zip(table["scores"], values, strict=True))
    return scores


@functools.cache
def _content() -> dict[str, Any]:
    text = resources.files("s2q.evaluation").joinpath("data", "paper.yaml").read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    return content
