"""Figures of the docs that `python benchmarks/tables.py` draws from results: error against minutes, the concepts."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import concept_figures
from methods import WIDTHS, mean_error, with_shared_videos
from peer_tables import records_of

from s2q.recipes.methods import is_rival
from s2q.report.cost_chart import OURS, PEER, RIVAL, Point, cost_chart

IMAGES = Path(__file__).parents[1] / "docs/images"
MODELS = ("shapes-cogvideox", "shapes-wan")
COMPARED = "shapes-wan"
STEPS = ("rtn", "table", "quarot", "svdquant", "s2q", "s2q-plus", "s2q-table")
"""Methods from rounding to nearest to everything learned."""
STYLE = """
text{font:12px ui-sans-serif,system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;fill:#59636e}
.heading{font-size:15px;font-weight:600;fill:#1f2328}.grid{stroke:#d1d9e0}.leader{stroke:#8c959f;stroke-width:.7}
.front{fill:none;stroke:#8c959f;stroke-width:1.4;stroke-dasharray:5 4}.rival{fill:#6e7781}
.ours{fill:#0969da}.peer{fill:#bc4c00}.label{paint-order:stroke;stroke:#fff;stroke-width:3px}.label.rival{fill:#59636e}.label.ours{font-weight:600}
.point.hollow{fill:#fff;stroke-width:1.8}.point.peer.hollow{stroke:#bc4c00}.point.rival.hollow{stroke:#6e7781}
.point.ours.hollow{stroke:#0969da}
@media (prefers-color-scheme:dark){text,.label.rival{fill:#9198a1}.heading{fill:#e6edf3}.grid{stroke:#3d444d}
.rival{fill:#848d97}.ours,.label.ours{fill:#4493f8}.peer,.label.peer{fill:#f0883e}
.label{stroke:#0d1117}.point.hollow{fill:#0d1117}.point.peer.hollow{stroke:#f0883e}.point.rival.hollow{stroke:#848d97}
.point.ours.hollow{stroke:#4493f8}.leader,.front{stroke:#656c76}}
"""


def points(model: str, width: str, *, methods: Collection[str] = ()) -> list[Point]:
    """What was measured at a width; beside eight-bit activations, also what leaves them in sixteen bits.

    With methods, only their recipes of this width, and all peers.
    """
    widths = (width, f"{width[:3]}16") if width.endswith("a8") else (width,)
    records = {
        name: record
        for bits in widths
        for name, record in records_of(model, bits).items()
        if not methods or "width" in record or (bits == width and name.rpartition("-")[0] in methods)
    }
    return [
        Point(
            label=name.rpartition("-")[0],
            seconds=record["quantize_seconds"],
            error=mean_error(record),
            kind=PEER if "width" in record else RIVAL if is_rival(name) else OURS,
            hollow=name.endswith("a16"),
        )
        for name, record in with_shared_videos(records).items()
    ]


def _heading(width: str, shown: list[Point]) -> str:
    heading = f"W{width[1]}A{width[3]}"
    return f"{heading} and W{width[1]}A16" if any(point.hollow for point in shown) else heading


def every_method() -> str:
    """All methods on one model, width by width."""
    panels = {width: points(COMPARED, width) for width in WIDTHS}
    return _file([(_heading(width, panels[width]), panels[width]) for width in WIDTHS])


def why_calibrate() -> str:
    """What calibration buys at W4A8, on two models."""
    panels = {model: points(model, "w4a8", methods=STEPS) for model in MODELS}
    return _file([(f"{model}, {_heading('w4a8', shown)}", shown) for model, shown in panels.items()])


FIGURES: Mapping[str, Callable[[], str]] = {
    "error-against-minutes.svg": every_method,
    "why-calibrate.svg": why_calibrate,
    "concept-sds.svg": concept_figures.selection,
    "concept-std.svg": concept_figures.attention,
    "concept-transforms.svg": concept_figures.transforms,
    "concept-gptq.svg": concept_figures.gptq,
}


def _file(panels: list[tuple[str, list[Point]]]) -> str:
    """A chart as an SVG file."""
    head, _, body = str(cost_chart(panels)).partition(">")
    head = head.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"')
    return f"{head}>\n<style>{STYLE}</style>\n{body}\n".replace("</g><g transform", "</g>\n<g transform")
