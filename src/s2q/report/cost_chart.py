"""Error against the minutes that quantizing takes: a panel a width, both axes logarithmic, as inline SVG.

The line is what the time buys: the least error of everything that takes no longer.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

OURS, RIVAL, PEER = "ours", "rival", "peer"
"""Kinds of a point: what s2q adds, a recipe of another method, another tool."""

_MEANINGS = {
    OURS: "s2q",
    RIVAL: "other methods",
    PEER: "other tools",
}

_WIDTH, _HEIGHT = 580, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 14, 34, 46
_COLUMNS, _LEGEND = 2, 34
_FONT, _CHARACTER = 12, 7.3
_RADIUS = 4.5
_DISTANCES = (9.0, 20.0, 32.0, 46.0, 62.0)
_DIRECTIONS = ((1, 0), (-1, 0), (1, -1), (-1, -1), (1, 1), (-1, 1), (0, -1), (0, 1))

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in the units of the chart."""

Place = tuple[float, float]
"""Across and down in the units of the chart."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """Something quantized: its label, the seconds it took, its relative velocity error, and one of the kinds.

    `hollow` are those that leave the activations alone.
    """

    label: str
    seconds: float
    error: float
    kind: str
    hollow: bool = False

    @property
    def style(self) -> str:
        """The classes of its mark and its label."""
        return f"{self.kind} hollow" if self.hollow else self.kind


def cost_chart(panels: Sequence[tuple[str, Sequence[Point]]]) -> Markup:
    """Draw a panel for each heading with points; all share the axis of time. Empty without points.

    Points need a positive time and error; others are left out.
    """
    positive = [(heading, [at for at in points if min(at.seconds, at.error) > 0]) for heading, points in panels]
    shown = [(heading, points) for heading, points in positive if points]
    if not shown:
        return Markup("")
    every = [point for _, points in shown for point in points]
    minutes = _decades([point.seconds / 60 for point in every])
    rows, columns = -(-len(shown) // _COLUMNS), min(_COLUMNS, len(shown))
    body = "".join(
        f'<g transform="translate({index % _COLUMNS * _WIDTH} {index // _COLUMNS * _HEIGHT})">'
        f"{''.join(_panel(heading, points, minutes))}</g>"
        for index, (heading, points) in enumerate(shown)
    )
    body += _legend(every, rows * _HEIGHT + 18)
    label = f"Velocity error against minutes of quantization: {'; '.join(heading for heading, _ in shown)}"
    return Markup(  # every piece of text is escaped where it is made
        f'<svg class="chart cost" viewBox="0 0 {columns * _WIDTH} {rows * _HEIGHT + _LEGEND}" role="img" '
        f'aria-label="{escape(label)}">{body}</svg>'
    )


def _panel(heading: str, points: Sequence[Point], minutes: tuple[int, int]) -> Iterator[str]:
    errors = _decades([point.error for point in points])

    def x(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * _share(value, minutes)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * _share(value, errors)

    yield _text(_LEFT, 20, heading, "start", "heading")
    for exponent in range(minutes[0], minutes[1] + 1):
        at = x(10.0**exponent)
        yield f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
        yield _text(at, _HEIGHT - _BOTTOM + 18, f"{10.0**exponent:g}")
    for exponent in range(errors[0], errors[1] + 1):
        at = y(10.0**exponent)
        yield f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield _text(_LEFT - 8, at + 4, f"{100 * 10.0**exponent:g} %", "end")
    yield _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, "minutes of quantization; left and low is better")
    places = {point: (x(point.seconds / 60), y(point.error)) for point in points}
    front = _front(sorted(places.values()), _WIDTH - _RIGHT)
    yield f'<polyline class="front" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in front)}"/>'
    for point, (across, down) in places.items():
        tip = f"{point.label}: {100 * point.error:.3g} % in {point.seconds / 60:.3g} min"
        yield f'<g class="point {point.style}">{_mark(point, across, down)}<title>{escape(tip)}</title></g>'
    yield from _labels(places, front)


def _legend(points: Sequence[Point], down: float) -> str:
    kinds = {point.kind for point in points}
    meanings = [(kind, False, text) for kind, text in _MEANINGS.items() if kind in kinds]
    if any(point.hollow for point in points):
        meanings.append((PEER if PEER in kinds else RIVAL, True, "16-bit activations"))
    parts, across = [], float(_LEFT)
    for kind, hollow, text in meanings:
        point = Point(label="", seconds=0, error=0, kind=kind, hollow=hollow)
        parts += [f'<g class="point {point.style}">{_mark(point, across, down)}</g>']
        parts.append(_text(across + 12, down + 4, text, "start"))
        across += 34 + _CHARACTER * len(text)
    line = f'<polyline class="front" points="{across - 8:.1f},{down} {across + 22:.1f},{down}"/>'
    return "".join([*parts, line, _text(across + 30, down + 4, "least error within the time", "start")])


def _front(places: Sequence[Place], end: float) -> list[Place]:
    """The corners of the stairs under all points; a larger ordinate is a smaller error."""
    corners: list[Place] = []
    for across, down in places:
        if not corners or down > corners[-1][1]:
            corners += [(across, corners[-1][1])] if corners else []
            corners.append((across, down))
    return [*corners, (end, corners[-1][1])]


def _mark(point: Point, across: float, down: float) -> str:
    if point.kind == PEER:
        size = _RADIUS + 1.5
        return f'<path d="M{across:.1f} {down - size:.1f}l{size} {size}l-{size} {size}l-{size} -{size}z"/>'
    return f'<circle cx="{across:.1f}" cy="{down:.1f}" r="{_RADIUS}"/>'


def _labels(places: Mapping[Point, Place], front: Sequence[Place]) -> Iterator[str]:
    """Labels beside their points, each where nothing is yet; one further off is joined to its point by a line."""
    taken = [(a - _RADIUS - 1, b - _RADIUS - 1, a + _RADIUS + 1, b + _RADIUS + 1) for a, b in places.values()]
    taken += [(min(a, c) - 1, min(b, d) - 1, max(a, c) + 1, max(b, d) + 1) for (a, b), (c, d) in pairwise(front)]
    for point, (across, down) in places.items():
        options = [
            (distance, _box(point.label, across + dx * distance, down + dy * distance, dx))
            for distance in _DISTANCES
            for dx, dy in _DIRECTIONS
        ]
        distance, box = min(options, key=lambda option: (_overlap(option[1], taken), option[0]))
        taken.append(box)
        if distance > _DISTANCES[0]:
            near = min(max(across, box[0]), box[2]), min(max(down, box[1]), box[3])
            yield f'<path class="leader" d="M{across:.1f} {down:.1f}L{near[0]:.1f} {near[1]:.1f}"/>'
        yield _text(box[0], box[3] - 4, point.label, "start", f"label {point.style}")


def _box(label: str, across: float, down: float, side: int) -> Box:
    wide = _CHARACTER * len(label)
    left = across if side > 0 else across - wide if side < 0 else across - wide / 2
    return left, down - _FONT / 2 - 2, left + wide, down + _FONT / 2 + 2


def _overlap(box: Box, taken: Sequence[Box]) -> float:
    """The area that a box shares with others, and what of it is outside of the panel."""

    def shared(other: Box) -> float:
        across = min(box[2], other[2]) - max(box[0], other[0])
        return max(0.0, across) * max(0.0, min(box[3], other[3]) - max(box[1], other[1]))

    inside = shared((_LEFT + 2, _TOP, _WIDTH - 2, _HEIGHT - _BOTTOM - 2))
    return sum(map(shared, taken)) + (box[2] - box[0]) * (box[3] - box[1]) - inside


def _decades(values: Sequence[float]) -> tuple[int, int]:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)


def _share(value: float, decades: tuple[int, int]) -> float:
    low, high = decades
    return (math.log10(value) - low) / (high - low)


def _text(x: float, y: float, text: str, anchor: str = "middle", kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
