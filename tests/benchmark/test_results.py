import json

import pytest

from s2q.benchmark.machine import hardware
from s2q.benchmark.results import (
    IDENTITY,
    ResultsFile,
    identity,
    place_of,
)
from s2q.common.errors import InvalidInputError

HERE = {"hardware": {"device": "cpu", "threads": 1}, "versions": {"torch": "2.13.0"}}


def entry(**fields):
    return identity(op="linear", scheme="w4a6", recipe="r", backend="auto", **fields)


def test_results_are_written_as_they_come_and_found_again(tmp_path):
    path = tmp_path / "deeper" / "bench.json"
    results = ResultsFile(path, **HERE)
    assert not path.exists()
    results.add([entry(shape=[1, 2, 3]) | {"milliseconds": 1.0}])
    content = json.loads(path.read_text())
    assert content["schema_version"] == 1
    assert content.keys() == {"schema_version", "hardware", "versions", "results"}
    assert set(IDENTITY) <= content["results"][0].keys()
    again = ResultsFile(path, **HERE)
    assert again.has(entry(shape=[1, 2, 3]))
    assert not again.has(entry(shape=[1, 2, 4]))
    assert not again.has(entry(shape=[1, 2, 3]) | {"backend": "triton"})
    again.add([entry(shape=[1, 2, 4]) | {"milliseconds": 2.0}])
    assert [one["milliseconds"] for one in json.loads(path.read_text())["results"]] == [1.0, 2.0]


def test_again_replaces_what_is_measured_and_keeps_the_rest(tmp_path):
    path = tmp_path / "bench.json"
    ResultsFile(path, **HERE).add([entry(shape=[1, 2, n]) | {"milliseconds": 1.0} for n in (3, 4)])
    results = ResultsFile(path, **HERE, again=True)
    assert not results.has(entry(shape=[1, 2, 3]))
    results.add([entry(shape=[1, 2, 3]) | {"milliseconds": 5.0}])
    assert results.has(entry(shape=[1, 2, 3]))
    found = {one["shape"][2]: one["milliseconds"] for one in json.loads(path.read_text())["results"]}
    assert found == {3: 5.0, 4: 1.0}


@pytest.mark.parametrize(
    "there", [HERE | {"hardware": {"device": "cpu", "threads": 2}}, HERE | {"versions": {"torch": "2.11.0"}}]
)
def test_a_file_of_another_machine_is_not_mixed_with_this_one(tmp_path, there):
    path = tmp_path / "bench.json"
    ResultsFile(path, **there).add([entry(shape=[1, 2, 3])])
    before = path.read_bytes()
    with pytest.raises(InvalidInputError, match="another machine or with other versions: (threads 2|torch '2.11.0')"):
        ResultsFile(path, **HERE)
    assert path.read_bytes() == before
    results = ResultsFile(path, **HERE, again=True)
    assert not results.has(entry(shape=[1, 2, 3]))
    results.add([entry(shape=[1, 2, 9])])
    assert [one["shape"] for one in json.loads(path.read_text())["results"]] == [[1, 2, 9]]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 1}', '{"schema_version": 2, "results": []}'])
def test_other_files_are_left_alone(tmp_path, text):
    path = tmp_path / "notes.json"
    path.write_text(text)
    with pytest.raises(InvalidInputError, match="choose another file"):
        ResultsFile(path, **HERE, again=True)
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({}, "A CPU, 2 threads"),
        ({"threads": 1}, "A CPU, 1 thread"),
        ({"instruction_set": "AVX2", "limited_by": None}, "A CPU, AVX2, 2 threads"),
        (
            {"instruction_set": "AVX2", "limited_by": "ONEDNN_MAX_CPU_ISA=AVX2"},
            "A CPU, AVX2 (capped by ONEDNN_MAX_CPU_ISA=AVX2), 2 threads",
        ),
        ({"gpu": "NVIDIA H200", "instruction_set": "AVX2"}, "NVIDIA H200"),
    ],
)
def test_the_place_names_the_instruction_set_where_the_file_has_it(changes, place):
    assert place_of({"processor": "A CPU", "threads": 2} | changes) == place


def test_files_of_two_instruction_sets_are_not_mixed(tmp_path, monkeypatch):
    from s2q.common import processor

    monkeypatch.setattr(processor, "features", lambda: frozenset({"avx2"}))
    here = {"hardware": hardware("cpu"), "versions": {}}
    assert here["hardware"]["instruction_set"] == processor.instruction_set()
    ResultsFile(tmp_path / "bench.json", **here).add([entry(shape=[1, 2, 3]) | {"milliseconds": 1.0}])
    for change in ({"instruction_set": "AVX-512"}, {"limited_by": "ONEDNN_MAX_CPU_ISA=AVX2 "}):
        with pytest.raises(InvalidInputError, match="another machine"):
            ResultsFile(tmp_path / "bench.json", **here | {"hardware": here["hardware"] | change})
