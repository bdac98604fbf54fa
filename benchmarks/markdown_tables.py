"""Rows and cells of Markdown tables, and the means that they show."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from s2q.evaluation.intervals import clustered_mean


def table_head(first: str, names: Sequence[str]) -> list[str]:
    """Return the two lines that a table begins with."""
    return [table_row(first, names), table_row("---", ["---"] * len(names))]


def table_row(name: str, cells: Sequence[str]) -> str:
    """Return a line of a table."""
    return f"| {name} | " + " | ".join(cells) + " |"


def interval(metric: Mapping[str, Any], form: str, *, scale: float = 1.0) -> str:
    """Return a mean with its interval, where there is one.

    Args:
        metric: `mean`, `low`, `high`, as in `eval.json`.
        form: Format of a number; the point that "#g" leaves at the end of a whole number is taken off.
        scale: What each is multiplied with.
    """
    ends = ("mean",) if metric["low"] is None else ("mean", "low", "high")
    mean, *around = (format(metric[end] * scale, form).rstrip(".") for end in ends)
    return f"{mean} [{', '.join(around)}]" if around else mean


def mean_by_prompt(videos: Iterable[Mapping[str, Any]], metric: str) -> dict[str, Any] | None:
    """Return `mean`, `low` and `high` of a metric over the prompts of videos; None where none has it.

    Args:
        videos: Each with its `prompt` and `metrics`, as in `eval.json`.
    """
    by_prompt: dict[str, list[float]] = {}
    for video in videos:
        value = video["metrics"].get(metric)
        if value is not None:
            by_prompt.setdefault(video["prompt"], []).append(value)
    if not by_prompt:
        return None
    estimate = clustered_mean(by_prompt, proportion="adherence" in metric)
    return {"mean": estimate.mean, "low": estimate.low, "high": estimate.high}
