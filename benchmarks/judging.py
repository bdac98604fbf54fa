"""The tables of docs/judging.md: what each metric is, and what the paper's judges said."""

from markdown_tables import table_head, table_row

from s2q.evaluation import metrics, velocity
from s2q.evaluation.judges import adherence, learned
from s2q.evaluation.judges.evalcrafter import NEEDS
from s2q.evaluation.paper import paper_tables
from s2q.evaluation.video_metrics import VELOCITY
from s2q.report.formatting import title_of


def metrics_table(kind: str) -> str:
    """Name, title and definition of metrics, as `eval.json` has them.

    Args:
        kind: "built-in", or "learned" for those that need weights.
    """
    definitions = learned.DEFINITIONS if kind == "learned" else metrics.DEFINITIONS
    rows = [
        (name, f"{text}; needs `{learned.NEEDS[name]}`" if kind == "learned" else text)
        for name, text in definitions.items()
    ]
    if kind != "learned":
        rows += [*adherence.DEFINITIONS.items(), (VELOCITY, velocity.DEFINITION)]
    lines = table_head("metric", ["in `eval.json`", "what it is"])
    return "\n".join([*lines, *(table_row(title_of(name), [f"`{name}`", text]) for name, text in rows)])


def evalcrafter_table(_: str) -> str:
    """EvalCrafter's five figures, and what each needs."""
    lines = table_head("figure", ["in `eval.json`", "what it needs"])
    rows = [table_row(title_of(name), [f"`{name}`", need.removeprefix("needs ")]) for name, need in NEEDS.items()]
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
