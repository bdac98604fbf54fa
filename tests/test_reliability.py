"""The results file of the fault suite."""

import json

from reliability import record


def test_sections_are_replaced_one_by_one_and_say_where_they_were_counted(tmp_path):
    results = tmp_path / "reliability.json"
    for section, count in (("kills", 1), ("signals", 2), ("kills", 3)):
        record(section, {"runs": count}, results=results)
    content = json.loads(results.read_text())
    assert {section: entry["counts"] for section, entry in content.items()} == {
        "kills": {"runs": 3},
        "signals": {"runs": 2},
    }
    assert {"hardware", "versions", "command", "date", "counts"} == content["kills"].keys()
    assert "instruction_set" in content["kills"]["hardware"]
