"""Thousands of mutated files, each loaded in a process with limits: refused by name, or what was written."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from reliability import record

from hostile.server import READY, SECONDS
from quick import quick

TESTS = Path(__file__).parents[1]
SHORT = {"as_it_is": 90, "rebuilt": 20, "plain": 30, "inspected": 40, "code": 20, "recipes": 150, "prompts": 150}
LONG = {"as_it_is": 1500, "rebuilt": 300, "plain": 500, "inspected": 550, "code": 150, "recipes": 3500, "prompts": 3500}
VERDICTS = {
    "as_it_is": {"error", "identical"},
    "rebuilt": {"error", "identical", "other values"},  # finite values of the right shape: whoever made them meant them
    "plain": {"error", "identical"},
    "inspected": {"error", "identical"},
    "code": {"error", "identical", "other values"},  # a configuration with a key that nobody reads
    "recipes": {"error", "valid"},
    "prompts": {"error", "valid"},
}
MAY_DIFFER = {"unchanged", "README.md", "s2q/manifest.json"}
"""Files that a load may find altered: the model card, and the manifest in other words."""


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    """The process that loads mutated files of a tiny checkpoint."""
    folder = tmp_path_factory.mktemp("mutated")
    (folder / "scratch").mkdir()
    settings = {"checkpoint": str(checkpoint), "scratch": str(folder / "scratch")}
    process = subprocess.Popen(
        [sys.executable, "-m", "hostile.server", json.dumps(settings)],
        env={"PYTHONPATH": ":".join([str(TESTS), *sys.path]), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        | {"HOME": str(folder), "TOKENIZERS_PARALLELISM": "false"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(folder / "server.txt").open("wb"),
        text=True,
    )
    first = json.loads(process.stdout.readline() or "{}")
    assert first.get(READY), (folder / "server.txt").read_text()[-2000:]
    assert len(first["threads"]) == 1, first
    yield process
    process.stdin.close()
    assert process.wait() == 0


def outcomes(server, kind, seeds):
    """What became of the mutations of a kind."""
    print(json.dumps({"kind": kind, "seeds": list(seeds)}), file=server.stdin, flush=True)
    answers = iter(lambda: json.loads(server.stdout.readline()), {"end": True})
    return list(answers)


def check(kind, results, count):
    """Every file is refused by name or loads as it was; nothing runs, nothing hangs, nothing dies."""
    assert len(results) == count
    assert not [result for result in results if result["verdict"] not in VERDICTS[kind]]
    assert not [result for result in results if result["executed"]]
    assert not [result for result in results if result["cpu_seconds"] > SECONDS]
    if kind in ("as_it_is", "plain", "inspected"):
        unnoticed = [result for result in results if result["verdict"] == "identical"]
        assert {result["what"] for result in unnoticed} <= (MAY_DIFFER if kind == "as_it_is" else {"unchanged"})
    assert sum(result["verdict"] == "error" for result in results) > count / 5  # they are hostile


@pytest.mark.parametrize("part", quick(["a third", "the rest"], "a third"))
@pytest.mark.parametrize("kind", SHORT)
def test_mutated_files_are_refused_by_name_or_load_as_they_were(server, kind, part):
    seeds = range(SHORT[kind])
    seeds = seeds[: len(seeds) // 3] if part == "a third" else seeds[len(seeds) // 3 :]
    check(kind, outcomes(server, kind, seeds), len(seeds))


@pytest.mark.faults
def test_ten_thousand_mutated_files_are_refused_by_name_or_load_as_they_were(server):
    results = {kind: outcomes(server, kind, range(10**6, 10**6 + count)) for kind, count in LONG.items()}
    verdicts = {
        kind: dict(sorted(Counter(item["verdict"] for item in items).items())) for kind, items in results.items()
    }
    everything = [item for items in results.values() for item in items]
    counts = {
        "files": len(everything),
        "executed": sum(item["executed"] for item in everything),
        "slowest_cpu_seconds": round(max(item["cpu_seconds"] for item in everything), 2),
        "verdicts": verdicts,
    }
    record("hostile_files", counts)
    for kind, items in results.items():
        check(kind, items, LONG[kind])
