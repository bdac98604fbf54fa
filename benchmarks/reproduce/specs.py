"""What each table consists of: its rows, as variants of recipes, and the paper's figures, which the package has."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from variants import GROUPS, Variant

from s2q.common.errors import InvalidInputError, unknown_name
from s2q.evaluation.paper import FULL_PRECISION, METHOD, paper_tables
from s2q.recipes.load import load_recipe, recipe_names

NO_RECIPE = "no recipe yet"
_BASELINES = {
    "Q-DiT": "q-dit",
    "PTQ4DiT": "ptq4dit",
    "SmoothQuant": "smoothquant",
    "QuaRot": "quarot",
    "ViDiT-Q": "vidit-q",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table.

    Attributes:
        method: What it is called; the paper's name, where the paper has the row.
        variant: What is quantized; None for full precision.
        in_paper: Whether the paper has the row, with figures or without.
    """

    method: str
    variant: Variant | None
    in_paper: bool = True

    @property
    def runs(self) -> bool:
        """Whether there is something to quantize, and a recipe to do it with."""
        return self.variant is not None and self.variant.recipe in recipe_names()


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the paper.

    Attributes:
        name: Its name on the command line.
        rows: Its rows in order.
        runs: How often each row is quantized, with seeds 0 and up.
        kind: "quality" is judged against full precision; "speed" is planned and timed on random weights.
    """

    name: str
    rows: tuple[Row, ...]
    runs: int = 1
    kind: Literal["quality", "speed"] = "quality"

    @property
    def paper(self) -> dict[str, Any]:
        """What the paper says: `title`, `comparable`, `metrics`, `prompts`, `claims`, `values`."""
        return paper_tables()[self.name]

    def paper_values(self, model: str | None) -> dict[str, list[float | None]]:
        """Return the paper's figures of a model by method; empty where it has none.

        Args:
            model: Name of the published model, "cogvideox-2b"; None if it is none.
        """
        values: dict[str, list[float | None]] = self.paper["values"].get(model, {})
        return values


def row_overrides(variant: Variant, changes: Sequence[str]) -> tuple[str, ...]:
    """Return what a row overrides: the changes that were asked for as far as they concern it, then its own.

    Changes of `distillation` and `calibration` are for rows that distil and calibrate.

    Args:
        changes: "key=value" each, for all rows.
    """
    recipe = load_recipe(variant.recipe, overrides=variant.overrides)
    left_out = [] if recipe.distillation else ["distillation."]
    left_out += [] if recipe.calibrates else ["calibration."]
    return (*(change for change in changes if not change.startswith(tuple(left_out))), *variant.overrides)


def check_changes(table: Table, changes: Sequence[str]) -> None:
    """Refuse changes of what tells the rows of a table apart.

    Args:
        changes: "key=value" each, for all rows.

    Raises:
        InvalidInputError: If a row sets the key itself.
    """
    keys = {override.partition("=")[0] for row in table.rows if row.variant for override in row.variant.overrides}
    for change in changes:
        key = change.partition("=")[0]
        if any(f"{key}.".startswith(f"{set_}.") or f"{set_}.".startswith(f"{key}.") for set_ in keys):
            raise InvalidInputError(f"--set {change}: the rows of {table.name} differ in {key}; leave it out")


def _baselines(width: str, names: Iterable[str] = tuple(_BASELINES)) -> tuple[Row, ...]:
    """Other methods; each is run as soon as the package has its recipe."""
    named = [(name, f"{_BASELINES[name]}-{width}") for name in names]
    return tuple(Row(method=name, variant=Variant(name=key, label=f"`{key}`", recipe=key)) for name, key in named)


def _ours(width: str, *, plus: bool = True) -> tuple[Row, ...]:
    rows = [Row(method=METHOD, variant=_variant(f"s2q-{width}"))]
    if plus:
        rows.append(Row(method="s2q-plus, beyond the paper", variant=_variant(f"s2q-plus-{width}"), in_paper=False))
    return tuple(rows)


def _variant(recipe: str, name: str = "", *overrides: str) -> Variant:
    return Variant(name=f"{recipe}-{name}".rstrip("-"), label=f"`{recipe}`", recipe=recipe, overrides=overrides)


def _vbench(width: str, *baselines: str) -> tuple[Row, ...]:
    nearest = Row(method="rounding to nearest", variant=_variant(f"rtn-{width}"), in_paper=False)
    return (_FULL, nearest, *_baselines(width, baselines or tuple(_BASELINES)), *_ours(width))


def _group(name: str) -> tuple[Row, ...]:
    return tuple(Row(method=variant.label, variant=variant) for variant in GROUPS[name])


def _samples() -> tuple[Row, ...]:
    counts = (20, 40, 80)
    return tuple(
        Row(method=f"{count} samples", variant=variant)
        for count, variant in zip(counts, GROUPS["samples"], strict=True)
    )


def _parts() -> tuple[Row, ...]:
    sds, std = "calibration.selection=sds", "loss.weighting=attention"
    random, uniform = "calibration.selection=rtfp", "loss={}"
    ours = [
        ("neither", _variant("s2q-w4a4", "parts-6-learned-kronecker", uniform, random)),
        ("SDS", _variant("s2q-w4a4", "uniform", uniform)),
        ("STD", _variant("s2q-w4a4", "selection-rtfp", random)),
        ("SDS and STD", _variant("s2q-w4a4")),
    ]
    theirs = [
        ("PTQ4DiT", _variant("ptq4dit-w4a4")),
        ("PTQ4DiT with SDS", _variant("ptq4dit-w4a4", "sds", sds)),
        ("PTQ4DiT with STD", _variant("ptq4dit-w4a4", "std", std)),
        ("PTQ4DiT with both", _variant("ptq4dit-w4a4", "sds-std", sds, std)),
    ]
    return tuple(Row(method=method, variant=variant) for method, variant in (*ours, *theirs))


_FULL = Row(method=FULL_PRECISION, variant=None)

TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        Table(name="vbench-w4a6", rows=_vbench("w4a6")),
        Table(name="vbench-w4a4", rows=_vbench("w4a4", "QuaRot", "ViDiT-Q")),
        Table(name="evalcrafter", rows=(_FULL, *_ours("w4a6"))),
        Table(name="selection", rows=_group("selection"), runs=3),
        Table(name="token-weights", rows=_group("lambda-min")),
        Table(name="parts", rows=_parts()),
        Table(name="samples", rows=_samples()),
        Table(name="efficiency", rows=(_FULL, *_ours("w4a6")), kind="speed"),
    )
}


def chosen_rows(table: Table, only: Sequence[str]) -> Table:
    """Return a table with the rows that were asked for.

    Args:
        only: Names of variants; empty for all of them. Full precision stays.

    Raises:
        InvalidInputError: If there is no such row.
    """
    known = [row.variant.name for row in table.rows if row.variant]
    for name in only:
        if name not in known:
            raise unknown_name("row", name, known)
    kept = tuple(row for row in table.rows if not only or row.variant is None or row.variant.name in only)
    return replace(table, rows=kept)
