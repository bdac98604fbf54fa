"""Charts of a quantized model, as inline SVG: samples, losses of blocks, sensitivity of linears.

The first is figures 2 and 3 of the paper for this run: salience over prompts and denoising steps, with the
selected samples framed.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from s2q.report.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, decade, label_text, svg
from s2q.selection.plot import SCORES

LOSSES = {"rtn": "round to nearest", "initial": "before learning", "final": "as packed"}
"""Losses of a block in `report.json` that the chart has, with their titles."""
_GAP = 44
_MAX_CELL = 28
_ROW = 28


def selection_chart(record: Mapping[str, Any]) -> Markup:
    """Draw the scores of all candidates over denoising steps × prompts, selected candidates framed.

    A map for each score; colours go from 0 to 1, as in `selection.plot`.

    Args:
        record: The content of `selection.json`.
    """
    candidates = record["candidates"]
    rows = len(record["prompts"])
    columns = 1 + max(candidate["step"] for candidate in candidates)
    cell = min(_MAX_CELL, (WIDTH - LEFT - RIGHT) / columns)
    tall = min(cell, _MAX_CELL * 10 / rows) if rows > 10 else cell
    parts: list[str] = []
    top = float(TOP) + 14
    for key, title in SCORES.items():
        parts.append(f'<text class="heading" x="{LEFT}" y="{top - 8:.1f}">{escape(title)}</text>')
        parts += _map(candidates, key, top=top, cell=cell, tall=tall)
        parts.append(label_text(LEFT - 6, top + rows * tall / 2 + 5, "prompt", "end"))
        top += rows * tall + _GAP
    parts.append(label_text(LEFT + columns * cell / 2, top - _GAP + 22, "denoising step, from noise to video"))
    selected = sum(bool(candidate["selected"]) for candidate in candidates)
    label = f"Salience of {len(candidates)} candidates over prompts and denoising steps; {selected} are selected"
    return svg(label, top - _GAP + 30, parts)


def _map(candidates: Sequence[Mapping[str, Any]], key: str, *, top: float, cell: float, tall: float) -> list[str]:
    parts = []
    for candidate in candidates:
        value = candidate[key]
        x, y = LEFT + candidate["step"] * cell, top + candidate["prompt"] * tall
        strength = 0.08 + 0.92 * value
        tip = f"prompt {candidate['prompt'] + 1}, step {candidate['step'] + 1}: {value:.3g}"
        tip += ", selected" if candidate["selected"] else ""
        parts.append(
            f'<rect class="cell" x="{x:.1f}" y="{y:.1f}" width="{cell - 1:.1f}" height="{tall - 1:.1f}" '
            f'fill-opacity="{strength:.2f}"><title>{tip}</title></rect>'
        )
        if candidate["selected"]:
            parts.append(
                f'<rect class="selected" x="{x + 0.5:.1f}" y="{y + 0.5:.1f}" width="{cell - 2:.1f}" '
                f'height="{tall - 2:.1f}"/>'
            )
    return parts


def sensitivity_chart(sensitivity: Mapping[str, Any]) -> Markup:
    """Draw the velocity error of each kind of linears alone as bars, the largest first.

    Args:
        sensitivity: `sensitivity` of `eval.json`.
    """
    kinds = sensitivity["kinds"]
    largest = max(kind["mean"] for kind in kinds) or 1.0
    left = min(300.0, 24 + 8.4 * max(len(kind["linears"]) for kind in kinds))
    parts = []
    for index, kind in enumerate(kinds):
        y = TOP + _ROW * index
        length = (WIDTH - left - RIGHT - 84) * kind["mean"] / largest
        parts.append(label_text(left - 10, y + 16, kind["linears"], "end"))
        parts.append(
            f'<rect class="bar" x="{left:.1f}" y="{y + 2:.1f}" width="{max(length, 1):.1f}" height="{_ROW - 8}" rx="3">'
            f"<title>{escape(kind['linears'])}, {kind['count']} linears: {kind['mean']:.3g}</title></rect>"
        )
        parts.append(label_text(left + length + 8, y + 16, f"{kind['mean']:.2g}", "start"))
    label = f"Velocity error with the linears of one kind quantized, {len(kinds)} kinds"
    return svg(label, TOP + _ROW * len(kinds) + 8, parts)


def loss_chart(blocks: Sequence[Mapping[str, Any]]) -> Markup:
    """Draw the loss of every block, logarithmic: rounded to nearest, before learning, as packed; empty without one.

    Args:
        blocks: `blocks` of `report.json`.
    """
    lines = {key: [block["loss"].get(key) for block in blocks] for key in loss_keys(blocks)}
    positive = [value for values in lines.values() for value in values if value]
    if not positive:
        return Markup("")
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    high = max(high, low + 1)

    def x(index: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (index + 0.5) / len(blocks)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - math.log10(value)) / (high - low)

    parts = [decade(exponent, y(10.0**exponent)) for exponent in range(low, high + 1)]
    for key, values in lines.items():
        points = [(x(index), y(value), index, value) for index, value in enumerate(values) if value]
        path = " ".join(f"{across:.1f},{down:.1f}" for across, down, _, _ in points)
        parts.append(f'<polyline class="line {key}" points="{path}"/>')
        parts += [
            f'<circle class="dot {key}" cx="{across:.1f}" cy="{down:.1f}" r="4"><title>'
            f"{escape(blocks[index]['name'])}, {LOSSES[key]}: {value:.3g}</title></circle>"
            for across, down, index, value in points
        ]
    stride = max(1, math.ceil(len(blocks) / 12))
    parts += [label_text(x(index), HEIGHT - BOTTOM + 18, str(index)) for index in range(0, len(blocks), stride)]
    parts.append(label_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "block"))
    return svg(f"Loss of {len(blocks)} blocks: {', '.join(LOSSES[key] for key in lines)}", HEIGHT, parts)


def loss_keys(blocks: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the losses that `loss_chart` draws for these blocks: CSS class and title."""
    return {key: title for key, title in LOSSES.items() if any(block["loss"].get(key) for block in blocks)}
