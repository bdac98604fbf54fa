"""The paper's own figures (S²Q-VDiT, arXiv 2508.04016v3), from `data/paper.yaml`; none was measured by this project."""

from typing import Any

from s2q.evaluation.definitions import read_data

FULL_PRECISION = "full precision"
METHOD = "S²Q-VDiT"


def paper_tables() -> dict[str, dict[str, Any]]:
    """Return the tables by name: `title`, `comparable`, `metrics`, `prompts`, `claims`, `values`; some `scores`."""
    return dict(read_data("paper.yaml")["tables"])


def paper_model(model: str) -> str | None:
    """Return the paper's name of a model, None if it has no figures of it."""
    names = read_data("paper.yaml")["models"].items()
    return next((str(name) for name, ids in names if model.lower() in map(str.lower, ids)), None)


def published_scores(model: str, scheme: str) -> dict[str, dict[str, float]]:
    """Return the scores of VBench and EvalCrafter that the paper reports of a model quantized to a scheme, "w4a6".

    Returns:
        By method (`full precision`, `S²Q-VDiT`, the paper's baselines), the score by the name that `eval.json` has for
        it: per cent for VBench's dimensions, EvalCrafter's own units. Full precision has its scores under any scheme.
    """
    name = paper_model(model)
    scores: dict[str, dict[str, float]] = {}
    for table in paper_tables().values():
        for method, values in table["values"].get(name, {}).items() if "scores" in table else ():
            if method == FULL_PRECISION or table["scheme"] == scheme:
                scores.setdefault(method, {}).update(zip(table["scores"], values, strict=True))
    return scores
