"""Rows and cells of Markdown tables."""

from collections.abc import Mapping, Sequence
from typing import Any


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
