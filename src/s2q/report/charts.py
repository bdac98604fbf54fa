"""Small charts as inline SVG, coloured by the page's style sheet so that they follow light and dark."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from s2q.report.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, decade, label_text, svg

_ROW = 40
_LINE = 26


def velocity_chart(steps: Sequence[Mapping[str, Any]]) -> Markup:
    """Draw the velocity error of every denoising step, logarithmic, with a band; empty without a positive value.

    The entries are those of `eval.json`'s `velocity.steps`: `step`, `timestep`, `mean`, `low`, `high`.
    """
    positive = _positive(steps)
    if not positive:
        return Markup("")
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    high = max(high, low + 1)

    def x(index: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (index / max(1, len(steps) - 1))

    def y(value: float | None) -> float:
        exponent = math.log10(max(value or 0.0, 10.0**low))
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - exponent) / (high - low)

    parts = [decade(exponent, y(10.0**exponent)) for exponent in range(low, high + 1)]
    if all(step["low"] is not None for step in steps):
        upper = [f"{x(i):.1f},{y(step['high']):.1f}" for i, step in enumerate(steps)]
        lower = [f"{x(i):.1f},{y(step['low']):.1f}" for i, step in enumerate(steps)]
        parts.append(f'<polygon class="band" points="{" ".join(upper + lower[::-1])}"/>')
    line = " ".join(f"{x(i):.1f},{y(step['mean']):.1f}" for i, step in enumerate(steps))
    parts.append(f'<polyline class="line" points="{line}"/>')
    stride = max(1, math.ceil(len(steps) / 10))
    for i, step in enumerate(steps):
        tip = f"step {i + 1}, timestep {step['timestep']:g}: {step['mean']:.2e}"
        parts.append(
            f'<circle class="dot" cx="{x(i):.1f}" cy="{y(step["mean"]):.1f}" r="3"><title>{tip}</title></circle>'
        )
        if i % stride == 0 and (len(steps) - 1 - i >= stride or i == 0) or i == len(steps) - 1:
            parts.append(label_text(x(i), HEIGHT - BOTTOM + 18, str(i + 1)))
    parts.append(label_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "denoising step, from noise to video"))
    label = f"Relative velocity error per denoising step, from {steps[0]['mean']:.2e} to {steps[-1]['mean']:.2e}"
    return svg(label, HEIGHT, parts)


def adherence_chart(rows: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]]) -> Markup:
    """Draw prompt adherence of both models from 0 to 100 %, with intervals; empty without rows.

    A row is a label, the student's and the reference's entry of `eval.json`'s `metrics`.
    """
    if not rows:
        return Markup("")
    left, height = 120, TOP + _ROW * len(rows) + 26
    span = WIDTH - left - RIGHT - 8

    def x(value: float) -> float:
        return left + span * value

    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP - 6}" y2="{height - 24}"/>')
        parts.append(label_text(x(tick), height - 8, f"{tick * 100:g} %"))
    for index, (label, ours, theirs) in enumerate(rows):
        middle = TOP + _ROW * index + _ROW / 2 - 4
        parts.append(label_text(left - 12, middle + 4, label, "end"))
        for entry, y, kind, who in (
            (theirs, middle - 7, "reference", "full precision"),
            (ours, middle + 7, "student", "quantized"),
        ):
            if entry["mean"] is not None:
                values = [f"{100 * value:.1f}" for value in _ends(entry)]
                parts += _mark(entry, x, y, kind, f"{label}, {who}: {_interval(values, unit=' %')}")
    return svg("Prompt adherence of full precision and of the quantized model", height, parts)


def error_chart(groups: Sequence[tuple[str, Sequence[tuple[str, Mapping[str, Any]]]]]) -> Markup:
    """Draw the velocity error of the models of each width, logarithmic, with intervals; empty without values.

    A group is a heading with label and entry of `eval.json`'s `metrics` of each of its models.
    """
    positive = _positive(entry for _, rows in groups for _, entry in rows)
    if not positive:
        return Markup("")
    low, high = math.log10(min(positive)), math.log10(max(positive))
    low, high = low - 0.04 * (high - low) - 0.05, high + 0.04 * (high - low) + 0.05
    left = min(280, 30 + 9.2 * max(len(label) for _, rows in groups for label, _ in rows))
    height = TOP + sum(_LINE * (len(rows) + 1) for _, rows in groups) + 50

    def x(value: float) -> float:
        return left + (WIDTH - left - RIGHT - 60) * (math.log10(max(value, 10.0**low)) - low) / (high - low)

    parts = []
    for tick in _log_ticks(low, high):
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{height - 44:g}"/>')
        parts.append(label_text(x(tick), height - 26, f"{tick:g}"))
    parts.append(label_text((left + WIDTH - RIGHT) / 2, height - 6, "relative velocity error; lower is better"))
    y = float(TOP)
    for heading, rows in groups:
        parts.append(f'<text class="heading" x="0" y="{y + 17:.1f}">{escape(heading)}</text>')
        for label, entry in rows:
            y += _LINE
            parts += _error_row(label, entry, x, y + _LINE / 2 - 1, left)
        y += _LINE
    return svg("Relative velocity error of each model, with 95 % intervals", height, parts)


def _error_row(label: str, entry: Mapping[str, Any], x: Any, y: float, left: float) -> list[str]:
    values = _ends(entry)
    mark = _mark(entry, x, y, "student", f"{label}: {_interval([f'{value:.3g}' for value in values])}")
    value = f'<text class="value" x="{x(values[-1]) + 10:.1f}" y="{y + 5:.1f}">{entry["mean"]:.2g}</text>'
    return [label_text(left - 12, y + 5, label, "end"), *mark, value]


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two powers of ten: decades, with more between them where there are few."""
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        decades = range(math.floor(low), math.ceil(high) + 1)
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        inside = [tick for tick in ticks if low <= math.log10(tick) <= high]
        if len(inside) >= 3:
            break
    return inside


def _positive(entries: Iterable[Mapping[str, Any]]) -> list[float]:
    return [value for entry in entries for value in _ends(entry) if value and value > 0]


def _ends(entry: Mapping[str, Any]) -> list[float]:
    """The mean, and the ends of its interval where it has one."""
    return [entry[name] for name in ("mean", "low", "high") if entry[name] is not None]


def _interval(values: Sequence[str], *, unit: str = "") -> str:
    mean, *ends = values
    return f"{mean}{unit}" + (f" ({' to '.join(ends)}{unit})" if ends else "")


def _mark(entry: Mapping[str, Any], x: Any, y: float, kind: str, tip: str) -> list[str]:
    """A dot at the mean, on a line over the interval where there is one."""
    mean, *ends = map(x, _ends(entry))
    dot = f'<circle class="mark {kind}" cx="{mean:.1f}" cy="{y:.1f}" r="5"><title>{escape(tip)}</title></circle>'
    if not ends:
        return [dot]
    return [f'<line class="whisker {kind}" x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>', dot]
