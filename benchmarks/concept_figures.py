"""Pictures of docs/concepts.md, drawn from the results of ``concepts.py``: SDS, STD, transforms, GPTQ."""

import base64
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from s2q.report.attention_charts import map_chart, mass_chart
from s2q.report.run_charts import selection_chart
from s2q.report.svg import decade, label_text

RESULTS = Path(__file__).parent / "results/concepts.json"
STYLE = """
text{font:13px ui-sans-serif,system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;fill:#59636e}
.ground{fill:#fff}.heading{font-weight:600;fill:#1f2328}.grid{stroke:#d1d9e0}.cell,.bar,.dot{fill:#b4530a}
.selected{fill:none;stroke:#1f2328;stroke-width:2}.line{fill:none;stroke:#b4530a;stroke-width:2}.line.each{stroke-width:1;opacity:.4}
.line.uniform,.line.rtn{stroke:#59636e;stroke-dasharray:5 4;stroke-width:1.5}.bar.rtn{fill:#8c959f}
.tile{image-rendering:pixelated}.frame{fill:none;stroke:#d1d9e0}.value{font-weight:600;fill:#1f2328}
@media (prefers-color-scheme:dark){text{fill:#9198a1}.ground{fill:#151b23}
.heading,.value{fill:#e6edf3}.grid,.frame{stroke:#3d444d}
.cell,.bar,.dot{fill:#f0994a}.selected{stroke:#e6edf3}.line{stroke:#f0994a}.line.uniform,.line.rtn{stroke:#9198a1}
.bar.rtn{fill:#656c76}}
"""
WIDTH, MARGIN = 640, 16
_TITLES = {"none": "no transform", "smooth_scale": "channel scale", "smooth_scale + rotation": "scale and rotation"}
_METHODS = {"rtn": "round to nearest", "gptq": "GPTQ"}


def results() -> dict[str, Any]:
    """Read the measurements."""
    record: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return record


def selection() -> str:
    """Scores of all candidates of a run, selected ones framed (SDS)."""
    chart = str(selection_chart(results()["selection"]))
    return _file(_label(chart), [(chart, _height(chart))])


def attention() -> str:
    """Attention mass on the top tokens, and attention over the frames of a video (STD)."""
    record = results()
    stored = record["frames"]
    frames = np.frombuffer(zlib.decompress(base64.b64decode(stored["data"])), np.uint8).reshape(stored["shape"])
    charts = [str(mass_chart(record["blocks"])), str(map_chart(record["blocks"], frames))]
    return _file("; ".join(map(_label, charts)), [(chart, _height(chart)) for chart in charts])


def transforms() -> str:
    """The largest magnitude of each input channel before and after transforms."""
    record = results()["transforms"]
    height, left, gap = 210, 40, 14
    panel = (WIDTH - left - 2 * gap) / len(record["paths"])
    high = math.log10(max(max(path["channel_amax"]) for path in record["paths"].values()))

    def y(value: float) -> float:
        return 40 + (height - 70) * (1 - max(0.0, math.log10(max(value, 1.0))) / high)

    parts = [_grid(exponent, y(10.0**exponent), left, WIDTH) for exponent in range(int(high) + 1)]
    for index, (name, path) in enumerate(record["paths"].items()):
        start, channels = left + index * (panel + gap), path["channel_amax"]
        parts.append(f'<text class="heading" x="{start:.1f}" y="14">{_TITLES[name]}</text>')
        parts.append(label_text(start, 31, f"output error {_percent(path['output_error'])}", "start"))
        step = panel / len(channels)
        tops = "".join(f"V{y(value):.1f}H{start + (place + 1) * step:.1f}" for place, value in enumerate(channels))
        parts.append(f'<path class="bar" d="M{start:.1f} {y(1):.1f}{tops}V{y(1):.1f}z"/>')
        parts.append(label_text(start + panel / 2, height - 10, "input channel"))
    channels = len(record["paths"]["none"]["channel_amax"])
    return _file(
        f"Largest magnitude of {channels} input channels before and after transforms", [(_svg(parts, height), height)]
    )


def gptq() -> str:
    """Output error while columns are rounded, and the errors of weight and output at the end."""
    record = results()["gptq"]
    height, left, wide = 250, 56, 380
    curves, columns = record["output_error"], record["columns"]
    values = [value for curve in curves.values() for value in curve]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))

    def point(count: int, value: float) -> str:
        x = left + (wide - left) * count / columns[-1]
        return f"{x:.1f},{24 + (height - 70) * (high - math.log10(value)) / (high - low):.1f}"

    def y(value: float) -> float:
        return float(point(0, value).split(",")[1])

    parts = ['<text class="heading" x="0" y="12">error of the output, by columns rounded</text>']
    parts += [_grid(exponent, y(10.0**exponent), left, wide) for exponent in range(low, high + 1)]
    for name, curve in curves.items():
        line = " ".join(point(count, value) for count, value in zip(columns, curve, strict=True))
        parts.append(f'<polyline class="line {name}" points="{line}"/>')
        parts.append(label_text(wide - 6, y(curve[-1]) + (-8 if name == "rtn" else 18), _METHODS[name], "end"))
    for count in (0, columns[-1] // 2, columns[-1]):
        parts.append(label_text(float(point(count, 10.0**high).split(",")[0]), height - 28, str(count)))
    parts.append(label_text((left + wide) / 2, height - 8, "input columns of the weight"))
    top = 12.0
    for title, errors in (("error of the weight", record["weight_error"]), ("error of the output", _last(curves))):
        parts.append(f'<text class="heading" x="{wide + 40}" y="{top:.1f}">{title}</text>')
        for name, error in errors.items():
            length = (WIDTH - wide - 40 - 62) * error / max(errors.values())
            parts.append(label_text(wide + 40, top + 20, _METHODS[name], "start"))
            size = f'width="{max(1.5, length):.1f}" height="12" rx="2"'
            parts.append(f'<rect class="bar {name}" x="{wide + 40}" y="{top + 26:.1f}" {size}/>')
            parts.append(
                f'<text class="value" x="{wide + 48 + length:.1f}" y="{top + 37:.1f}">{_percent(error)}</text>'
            )
            top += 42
        top += 32
    return _file("Errors of rounding to nearest and of GPTQ", [(_svg(parts, height), height)])


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if value >= 0.01 else f"{100 * value:.2g} %"


def _last(curves: dict[str, list[float]]) -> dict[str, float]:
    return {name: curve[-1] for name, curve in curves.items()}


def _grid(exponent: int, y: float, left: float, right: float) -> str:
    line = decade(exponent, y).partition("/>")[2].replace(f'x="{62 - 10}"', f'x="{left - 8}"')
    return f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>{line}'


def _svg(parts: list[str], height: float) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}">{"".join(parts)}</svg>'


def _label(chart: str) -> str:
    return chart.partition('aria-label="')[2].partition('"')[0]


def _height(chart: str) -> float:
    return float(chart.partition('viewBox="0 0 640 ')[2].partition('"')[0])


def _file(label: str, charts: list[tuple[str, float]]) -> str:
    """Charts below each other as one SVG file, on a ground that is light or dark."""
    top, placed = float(MARGIN), []
    for chart, height in charts:
        body = chart.partition(">")[2]
        box = f'x="{MARGIN}" y="{top:g}" width="{WIDTH}" height="{height:g}" viewBox="0 0 {WIDTH} {height:g}"'
        placed.append(f"<svg {box}>{body}")
        top += height + MARGIN
    wide, xmlns = WIDTH + 2 * MARGIN, "http://www.w3.org/2000/svg"
    head = f'<svg xmlns="{xmlns}" viewBox="0 0 {wide} {top:g}" role="img" aria-label="{label}">'
    ground = f'<rect class="ground" width="{wide}" height="{top:g}" rx="10"/>'
    body = "\n".join(placed).replace("<rect", "\n<rect").replace("<image", "\n<image")
    return f"{head}\n<style>{STYLE}</style>\n{ground}\n{body}\n</svg>\n"
