"""The map of the packages in docs/architecture.md is the contract that import-linter checks."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def layers_of_docs():
    text = (ROOT / "docs/architecture.md").read_text()
    block = re.search(r"<!-- layers -->\n```\n(.*?)```", text, re.DOTALL)
    return [{name.strip() for name in line[:43].split("|")} for line in block[1].splitlines()]


def layers_of_contract():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [{name.strip(" ()") for name in layer.split("|")} for layer in layers]


def test_layers_of_the_page_equal_the_contract():
    assert layers_of_docs() == layers_of_contract()


def test_every_package_is_in_exactly_one_layer():
    source = ROOT / "src/s2q"
    names = {file.relative_to(source).parts[0].removesuffix(".py") for file in source.rglob("*.py")}
    packages = sorted(names - {"__init__"})
    assert sorted(name for layer in layers_of_docs() for name in layer) == packages


def test_the_walk_of_a_latent_has_at_most_26_files_each_once():
    text = (ROOT / "docs/architecture.md").read_text()
    section = text.partition("## One latent")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| `([a-z_/]+\.py)` \|", section, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
    assert len({file for _, file in rows}) == len(rows) <= 26
    assert {"run/work.py", "engines/engine.py"} < {file for _, file in rows}


def test_files_named_on_the_page_exist():
    text = (ROOT / "docs/architecture.md").read_text()
    named = re.findall(r"`([a-z_/]+/[a-z_0-9]+\.py)`", text)
    assert [name for name in named if not (ROOT / "src/s2q" / name).is_file()] == []
