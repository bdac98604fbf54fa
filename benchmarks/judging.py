"""The tables of docs/judging.md: what each metric is, and what the paper's judges said."""

from markdown_tables import table_head, table_row

from s2q.evaluation.definitions import definition_of, metric_table
from s2q.evaluation.judges.evalcrafter import evalcrafter_needs
from s2q.evaluation.paper import paper_tables
from s2q.evaluation.video_metrics import METRICS
from s2q.report.formatting import title_of


def metrics_table(kind: str) -> str:
    """Name, title and definition of metrics, as `eval.json` has them.

    Args:
        kind: "built-in", or "learned" for those that need weights.
    """
    metrics = metric_table()
    names = [name for name in metrics if "needs" in metrics[name]] if kind == "learned" else METRICS
    needs = {name: f"; needs `{metrics[name]['needs']}`" if kind == "learned" else "" for name in names}
    rows = [(name, definition_of(name) + needs[name]) for name in names]
    lines = table_head("metric", ["in `eval.json`", "what it is"])
    return "\n".join([*lines, *(table_row(title_of(name), [f"`{name}`", text]) for name, text in rows)])


def evalcrafter_table(_: str) -> str:
    """EvalCrafter's five figures, and what each needs."""
    lines = table_head("figure", ["in `eval.json`", "what it needs"])
    needs = {name: need.removeprefix("needs ") for name, need in evalcrafter_needs().items()}
    rows = [table_row(title_of(name), [f"`{name}`", need]) for name, need in needs.items()]
    return "\n".join([*lines, *rows])


def paper_table(name: str) -> str:
    """A table of the paper with its original figures.

    Args:
        name: Its name in `data/paper.yaml`.
    """
    table = paper_tables()[name]
    lines = table_head("model, method", table["metrics"])
    for model, methods in table["values"].items():
        for method, values in methods.items():
            cells = ["" if value is None else str(value) for value in values]
            lines.append(table_row(f"{model}, {method}", cells))
    return "\n".join(lines)
