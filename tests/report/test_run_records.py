"""Records of a run are read, older ones with less, and refused where they cannot be shown."""

import json
import re

import pytest

from pages import attention
from s2q.common.errors import InvalidInputError
from s2q.report.run_records import read_records


def report(**changes):
    block = {"name": "blocks.0", "layers": {"blocks.0.a": 0.1}, "weight_relative_error": 0.1, "seconds": 1.5}
    fields = {
        "schema_version": 1,
        "source": "tiny",
        "recipe": "s2q-w4a6",
        "storage": {"full_precision_bytes": 4, "quantized_bytes": 1, "ratio": 4.0},
        "layers": [{"name": "blocks.0.a", "scheme": "w4a6", "shape": [4, 8]}],
        "blocks": [block | {"loss": {"rtn": 0.5, "final": 0.1}, "attention": attention()}],
        "stages": [{"name": "blocks", "seconds": 2.0, "peak_memory_bytes": 10}],
    }
    return fields | changes


def without(content, name):
    return {key: value for key, value in content.items() if key != name}


def selection(**changes):
    scores = dict.fromkeys(("diffusion_salience", "quantization_salience", "salience"), 0.5)
    candidates = [{"prompt": 0, "step": 0, "selected": True, **scores}]
    fields = {"schema_version": 1, "selection": "sds", "prompts": ["a"], "seed": 0, "settings": {}}
    return fields | {"candidates": candidates} | changes


RECIPE = {"name": "s2q-w4a6", "loss": {"weighting": "attention"}}


def checkpoint(tmp_path, **records):
    (tmp_path / "s2q").mkdir()
    for name, content in ({"report": report(), "selection": selection(), "recipe": RECIPE} | records).items():
        if content is not None:
            (tmp_path / f"s2q/{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path


def test_a_whole_run_is_read_without_a_note(tmp_path):
    records = read_records(checkpoint(tmp_path))
    assert records.report == report()
    assert records.selection == selection()
    assert records.recipe == RECIPE
    assert records.notes == ()


def test_a_folder_without_results_gives_a_page_that_says_so(tmp_path):
    records = read_records(checkpoint(tmp_path, report=None, selection=None, recipe=None))
    assert records.blocks == ()
    assert len(records.notes) == 1
    assert "No report of a run is in this model" in records.notes[0]


def test_a_report_of_an_earlier_version_lacks_attention_and_says_so(tmp_path):
    blocks = [without(block, "attention") for block in report()["blocks"]]
    records = read_records(checkpoint(tmp_path, report=without(report(blocks=blocks), "stages")))
    assert [note for note in records.notes if "earlier version of s2q" in note] == list(records.notes)


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"recipe": {"name": "quarot-w4a6", "loss": {"weighting": "uniform"}}}, "weights all tokens alike"),
        ({"selection": None}, "selection of samples is not in this model"),
    ],
)
def test_what_a_run_did_not_record_is_noted(tmp_path, changes, note):
    blocks = [block | {"attention": None} for block in report()["blocks"]] if "recipe" in changes else None
    changed = {"report": report(blocks=blocks)} if blocks else {}
    assert any(note in text for text in read_records(checkpoint(tmp_path, **changes, **changed)).notes)


def test_a_recipe_without_calibration_is_noted_once(tmp_path):
    blocks = [without(block, "attention") | {"loss": {}} for block in report()["blocks"]]
    records = read_records(checkpoint(tmp_path, report=report(blocks=blocks, recipe="rtn-w4a6"), selection=None))
    assert records.notes == ("Recipe rtn-w4a6 needs no calibration: there are no samples, losses or attention.",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("report", report(schema_version=2), r"schema_version=2; expected 1 for a report page; upgrade s2q"),
        ("report", without(report(), "schema_version"), r"schema_version=None; expected 1 .*; copy the checkpoint"),
        ("report", "{", r"report.json: cannot be read as JSON"),
        ("report", without(report(), "storage"), r"storage is missing; copy the checkpoint again, or quantize again"),
        ("report", report(blocks=[3]), r"got 3; expected an object with name"),
        ("report", report(stages=[{"name": "a", "seconds": "1"}]), r"seconds='1'"),
        ("selection", selection(schema_version=7), r"selection.json: schema_version=7; .* upgrade s2q"),
        ("selection", selection(candidates=[]), r"candidates is empty"),
        ("selection", selection(candidates=[{"prompt": 0}]), r"step is missing"),
        ("selection", selection(prompts=[]), r"a candidate is of prompt 0, of 0"),
        ("selection", without(selection(), "settings"), r"settings is missing"),
        ("recipe", {"description": "a"}, r"recipe.json: cannot be shown as a page: name is missing"),
    ],
)
def test_a_record_that_cannot_be_shown_is_refused(tmp_path, name, content, message):
    with pytest.raises(InvalidInputError, match=message):
        read_records(checkpoint(tmp_path, **{name: content}))


def test_a_damaged_map_is_refused(tmp_path):
    record = attention()
    record["map"]["levels"] = record["map"]["levels"][:-4]
    (block,) = report()["blocks"]
    with pytest.raises(InvalidInputError, match=re.escape("report.json: cannot be shown as a page: a map of")):
        read_records(checkpoint(tmp_path, report=report(blocks=[block | {"attention": record}])))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fractions": [0, 1], "mass": [0, 1]}, "blocks have attention on different fractions of the tokens"),
        ({"fractions": [0, 1]}, "attention has other numbers of fractions than of masses"),
        ({"fractions": [], "mass": []}, "fractions of attention is empty"),
        ({"mass": [float("nan")] * 15}, "mass of attention: got nan, expected 0 to 1"),
        ({"text_share": None}, "text_share=None"),
    ],
)
def test_damaged_attention_is_refused(tmp_path, changes, message):
    (block,) = report()["blocks"]
    blocks = [block, block | {"name": "blocks.1", "attention": attention() | changes}]
    with pytest.raises(InvalidInputError, match=re.escape(f"report.json: cannot be shown as a page: {message}")):
        read_records(checkpoint(tmp_path, report=report(blocks=blocks)))
