"""The table of a comparison, as cells, as Markdown and as sentences that say who won what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from s2q.report.formatting import NOTHING, format_interval, format_sample, format_value, title_of

HEADINGS = {
    "velocity_relative_error": "velocity error",
    "psnr_frame_mean_db": "PSNR",
    "ssim": "SSIM",
    "flicker_rms": "flicker",
    "motion_ratio": "motion",
    "first_frame_psnr_db": "first frame",
    "lpips": "LPIPS",
    "clip_score": "CLIP score",
    "adherence_all": "adherence",
}
"""Metrics of the table, where they were measured."""

SIMULATED = "simulated"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A metric of an entry as text: mean, interval (or a dash), and whether it is the best of its width."""

    metric: str
    value: str
    interval: str
    best: bool


@dataclass(frozen=True, kw_only=True)
class Row:
    """An entry of the table, as text.

    Attributes:
        tags: Changes to its recipe, and `SIMULATED` if it cannot run on the integer kernels.
        storage: How many times smaller than in bfloat16.
        cells: Its metrics, as many as there are columns.
        error: Why it failed; empty if it did not.
    """

    label: str
    description: str
    tags: tuple[str, ...]
    storage: str
    cells: tuple[Cell, ...]
    seconds: str
    error: str


@dataclass(frozen=True, kw_only=True)
class Group:
    """The entries of one width, best first, failed ones last; the verdict says who won what, if anything."""

    width: str
    rows: tuple[Row, ...]
    verdict: str


def columns_of(result: Mapping[str, Any]) -> list[str]:
    """Return the metrics of the table that were measured."""
    return [
        name
        for name in HEADINGS
        if any((entry["metrics"].get(name) or NOTHING)["mean"] is not None for entry in result["entries"])
    ]


def groups_of(result: Mapping[str, Any]) -> list[Group]:
    """Return the table of `compare.json`, width by width."""
    columns = columns_of(result)
    compared = {group["width"]: group for group in result["groups"]}
    widths = [*compared, *(entry["width"] for entry in result["entries"])]
    groups = []
    for width in dict.fromkeys(widths):
        group = compared.get(width, {"ranking": [], "winners": {}})
        members = [entry for entry in result["entries"] if entry["width"] == width]
        ranking = group["ranking"]
        members.sort(key=lambda entry: ranking.index(entry["label"]) if entry["label"] in ranking else len(ranking))
        rows = tuple(_row(entry, columns, group["winners"]) for entry in members)
        groups.append(Group(width=width, rows=rows, verdict=_verdict(group, result)))
    return groups


def reference_cells(result: Mapping[str, Any]) -> list[Cell]:
    """Return what was measured on the full-precision videos themselves, as cells of the table."""
    return [_cell(name, result["reference_metrics"].get(name)) for name in columns_of(result)]


def floor_cells(result: Mapping[str, Any]) -> list[Cell]:
    """Return what another seed alone changes, as cells of the table; none without a noise floor."""
    if result["noise_floor"] is None:
        return []
    values = result["noise_floor"]["metrics"]
    return [_cell(name, {**NOTHING, "mean": values.get(name)}) for name in columns_of(result)]


def markdown(result: Mapping[str, Any]) -> str:
    """Return the comparison as a Markdown document."""
    columns = columns_of(result)
    headings = ["recipe", "storage", *(HEADINGS[name] for name in columns), "quantized in"]
    lines = [f"# {title(result)}", "", sample(result) + ".", ""]
    if result["warning"]:
        lines += [f"**{result['warning']}.**", ""]
    lines += [_line(headings), _line(["---"] * len(headings))]
    lines.append(_line(["full precision", "1.00×", *map(_shown, reference_cells(result)), ""]))
    failed = []
    for group in groups_of(result):
        lines.append(_line([f"*{group.width}*", *[""] * (len(headings) - 1)]))
        for row in group.rows:
            name = f"`{row.label}`" + (f" ({', '.join(row.tags)})" if row.tags else "")
            lines.append(_line([name, row.storage, *(_shown(cell) for cell in row.cells), row.seconds]))
            failed += [f"- `{row.label}`: {row.error}"] if row.error else []
    floor = floor_cells(result)
    if floor:
        lines.append(_line(["full precision, another seed", "", *(_shown(cell) for cell in floor), ""]))
    verdicts = [f"- {group.verdict}" for group in groups_of(result) if group.verdict]
    if verdicts:
        bold = "Bold: the best of its width where it clearly beats every other entry; what that means stands below."
        lines += ["", bold, "", *verdicts]
    if failed:
        lines += ["", "Failed:", "", *failed]
    lines += ["", "How the figures are made:", ""]
    lines += [f"- {name}: {text}" for name, text in definitions(result).items()]
    return "\n".join(lines) + "\n"


def definitions(result: Mapping[str, Any]) -> dict[str, str]:
    """Return what every word of the comparison means: its own terms, then each metric."""
    metrics = next((entry["metrics"] for entry in result["entries"] if entry["metrics"]), {})
    measured = {title_of(name): entry for name, entry in metrics.items() if not name.startswith("reference_")}
    terms = {"interval": result["settings"]["interval"], **result["definitions"]}
    return terms | {metric: entry["definition"] for metric, entry in measured.items()}


def title(result: Mapping[str, Any]) -> str:
    """Return a heading: what is compared with what."""
    count = len(result["entries"])
    names = " and ".join(entry["label"] for entry in result["entries"]) if count <= 2 else f"{count} entries"
    return f"{names} against full precision of {result['model']}"


def sample(result: Mapping[str, Any]) -> str:
    """Return what the figures were measured on."""
    settings = result["settings"]
    return (
        f"{format_sample(result['n_prompts'], result['n_seeds'])}, {settings['num_frames']} frames of "
        f"{settings['width']} × {settings['height']}, {settings['num_inference_steps']} steps, {settings['dtype']}, "
        "the same noise for all"
    )


def _row(entry: Mapping[str, Any], columns: Sequence[str], winners: Mapping[str, Any]) -> Row:
    storage, seconds = entry["storage"], entry["seconds"]
    return Row(
        label=entry["label"],
        description=entry["description"],
        tags=(*entry["overrides"], *((SIMULATED,) if entry["simulated"] else ())),
        storage="–" if storage is None else f"{storage['ratio']:.2f}×",
        cells=tuple(
            _cell(name, entry["metrics"].get(name), best=winners.get(name, {}).get("winner") == entry["label"])
            for name in columns
        ),
        seconds="–" if seconds is None else f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s",
        error=entry["error"] or "",
    )


def _cell(name: str, entry: Mapping[str, Any] | None, *, best: bool = False) -> Cell:
    entry = entry or NOTHING
    interval = format_interval(name, entry["low"], entry["high"])
    return Cell(metric=name, value=format_value(name, entry["mean"]), interval=interval, best=best)


def _verdict(group: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Who won what among the entries of a width."""
    if len(group["ranking"]) < 2:
        return ""
    if result["warning"]:
        return f"{group['width']}: no winner, the prompts are too few"
    won: dict[str, list[str]] = {}
    ties: dict[tuple[str, ...], list[str]] = {}
    for name in columns_of(result):
        verdict = group["winners"].get(name)
        if verdict is None:
            continue
        if verdict["winner"] is not None:
            won.setdefault(verdict["winner"], []).append(HEADINGS[name])
        else:
            tied = (verdict["best"], *verdict["tied_with"])
            if len(tied) == len(group["ranking"]):  # whoever is first among them
                tied = tuple(group["ranking"])
            ties.setdefault(tied, []).append(HEADINGS[name])
    parts = [f"{label} is best in {_and(names)}" for label, names in won.items()]
    for labels, names in ties.items():
        everyone = len(labels) == len(group["ranking"])
        who = "all are tied" if everyone else f"{labels[0]} is tied with {_and(labels[1:])}"
        parts.append(f"{who} in {_and(names)}")
    return f"{group['width']}: {'; '.join(parts)}" if parts else ""


def _and(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1]


def _shown(cell: Cell) -> str:
    value = f"**{cell.value}**" if cell.best else cell.value
    return value if cell.interval == "–" else f"{value} [{cell.interval}]"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
