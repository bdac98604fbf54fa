"""The records that a run left in its checkpoint, for the report page: report.json, selection.json, recipe.json.

A record of an earlier version of s2q may lack fields: what they show is omitted, with a sentence in `notes`. A record
of a later version, or a damaged one, is refused, before anything is computed for the page.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s2q.common.errors import InvalidInputError, short_repr
from s2q.common.files import read_json
from s2q.common.records import RECORDS, REPORT, REPORT_VERSION, SELECTION_VERSION
from s2q.distillation.attention_profile import ImportanceMap

SELECTION = RECORDS / "selection.json"
RECIPE = RECORDS / "recipe.json"

_REMEDY = "copy the checkpoint again, or quantize again"
_NUMBER = (int, float)


@dataclass(frozen=True, kw_only=True)
class RunRecords:
    """Records of a run; None or empty where there are none.

    Attributes:
        report: The content of s2q/report.json.
        selection: The content of s2q/selection.json, of the first transformer; None of recipes that do not calibrate.
        recipe: The resolved recipe.
        notes: Sentences about sections that the page cannot have.
    """

    report: Mapping[str, Any] | None = None
    selection: Mapping[str, Any] | None = None
    recipe: Mapping[str, Any] | None = None
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def blocks(self) -> Sequence[Mapping[str, Any]]:
        """Blocks of the report."""
        return self.report["blocks"] if self.report else ()


def read_records(folder: Path) -> RunRecords:
    """Read the records of a checkpoint.

    Raises:
        InvalidInputError: If one is damaged, or was written by a later version of s2q.
    """
    report = _read(folder / REPORT, REPORT_VERSION, _check_report)
    recipe = _read(folder / RECIPE, None, lambda content: _need(content, "name", str))
    if report is None:
        note = f"No report of a run is in this model ({REPORT}), so its stages, blocks and samples are not shown."
        return RunRecords(recipe=recipe, notes=(note,))
    selection = _read(folder / SELECTION, SELECTION_VERSION, _check_selection)
    return RunRecords(report=report, selection=selection, recipe=recipe, notes=tuple(_notes(report, selection, recipe)))


def _notes(
    report: Mapping[str, Any], selection: Mapping[str, Any] | None, recipe: Mapping[str, Any] | None
) -> list[str]:
    blocks, notes = report["blocks"], []
    calibrated = any(block.get("loss") for block in blocks)
    if blocks and not any(block.get("attention") for block in blocks):
        weighting = ((recipe or {}).get("loss") or {}).get("weighting")
        if calibrated and weighting == "attention":
            notes.append(
                "The run was made by an earlier version of s2q, which did not record attention; quantize again to "
                "see it."
            )
        elif calibrated:
            notes.append(
                f"Recipe {report['recipe']} weights all tokens alike, so the run recorded no attention "
                "(recipes with +std weight them)."
            )
    if not calibrated:
        notes.append(f"Recipe {report['recipe']} needs no calibration: there are no samples, losses or attention.")
    elif selection is None:
        notes.append(f"The selection of samples is not in this model ({SELECTION}).")
    return notes


def _read(path: Path, version: int | None, check: Callable[[Mapping[str, Any]], None]) -> dict[str, Any] | None:
    """Read a record; None if it is not there."""
    if not path.is_file():
        return None
    content = read_json(path, remedy=_REMEDY)
    found = content.get("schema_version")
    if version is not None and found != version:
        known = isinstance(found, int) and not isinstance(found, bool)
        remedy = "upgrade s2q" if known and found > version else _REMEDY
        raise InvalidInputError(
            f"{path}: schema_version={short_repr(found)}; expected {version} for a report page; {remedy}"
        )
    try:
        check(content)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise InvalidInputError(f"{path}: cannot be shown as a page: {reason}; {_REMEDY}") from error
    return content


def _check_report(content: Mapping[str, Any]) -> None:
    for name, kind in (("source", str), ("recipe", str), ("storage", dict), ("blocks", list), ("layers", list)):
        _need(content, name, kind)
    for name in ("full_precision_bytes", "quantized_bytes", "ratio"):
        _need(content["storage"], name, _NUMBER)
    for stage in content.get("stages") or ():
        _need(stage, "name", str)
        _need(stage, "seconds", _NUMBER)
        _need(stage, "peak_memory_bytes", _NUMBER)
    for layer in content["layers"]:
        _need(layer, "name", str)
        _need(layer, "scheme", str)
        _need(layer, "shape", list)
    for block in content["blocks"]:
        _need(block, "name", str)
        _need(block, "layers", dict)
        _need(block, "weight_relative_error", _NUMBER)
        _need(block, "seconds", _NUMBER)
        for name, loss in (block.get("loss") or {}).items():
            _need({name: loss}, name, _NUMBER)
        if block.get("attention"):
            _check_attention(block["attention"])
    fractions = [block["attention"]["fractions"] for block in content["blocks"] if block.get("attention")]
    if any(others != fractions[0] for others in fractions):
        raise ValueError("blocks have attention on different fractions of the tokens")


def _check_attention(attention: Mapping[str, Any]) -> None:
    for name in ("fractions", "mass"):
        _need(attention, name, list)
        for value in attention[name]:
            _need({name: value}, name, _NUMBER)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} of attention: got {value}, expected 0 to 1")
    if not attention["fractions"]:
        raise ValueError("fractions of attention is empty")
    if len(attention["fractions"]) != len(attention["mass"]):
        raise ValueError("attention has other numbers of fractions than of masses")
    _need(attention, "text_share", _NUMBER)
    if attention["map"] is not None:
        ImportanceMap.from_dict(attention["map"])


def _check_selection(content: Mapping[str, Any]) -> None:
    _need(content, "selection", str)
    _need(content, "prompts", list)
    _need(content, "seed", int)
    _need(content, "settings", dict)
    _need(content, "candidates", list)
    for candidate in content["candidates"]:
        for name in ("prompt", "step"):
            _need(candidate, name, int)
        for name in ("diffusion_salience", "quantization_salience", "salience"):
            _need(candidate, name, _NUMBER)
        _need(candidate, "selected", bool)
    if not content["candidates"]:
        raise ValueError("candidates is empty")
    if (last := max(candidate["prompt"] for candidate in content["candidates"])) >= len(content["prompts"]):
        raise ValueError(f"a candidate is of prompt {last}, of {len(content['prompts'])}")


def _need(content: Any, name: str, kind: type | tuple[type, ...]) -> None:
    if not isinstance(content, Mapping):
        raise TypeError(f"got {short_repr(content)}; expected an object with {name}")
    if not isinstance(content[name], kind):
        raise TypeError(f"{name}={short_repr(content[name])}")
