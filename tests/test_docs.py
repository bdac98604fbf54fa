"""The pages say what the results files say, and their links lead somewhere."""

import re
from pathlib import Path

import figures
import pytest
import tables
import torch
from yaml import safe_load

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
LONG_TABLES = ("choose.md", "ltx.md", "real-models.md", "results.md", "wan.md")


def pages_with_marks():
    """Pages with tables that take seconds are checked with the slow tests."""
    return [pytest.param(page, marks=pytest.mark.slow) if page.name in LONG_TABLES else page for page in PAGES]


@pytest.mark.parametrize("page", pages_with_marks(), ids=lambda page: page.name)
def test_tables_are_those_of_the_results_files(page):
    text = page.read_text()
    assert tables.filled(text) == text, f"{page.name} is out of date; run python benchmarks/tables.py"


@pytest.mark.parametrize("name", figures.FIGURES)
def test_figures_are_those_of_the_results_files(name):
    assert (figures.IMAGES / name).read_text() == figures.FIGURES[name](), (
        "out of date; run python benchmarks/tables.py"
    )


def test_every_marked_table_is_on_a_listed_page():
    marked = {str(page.relative_to(ROOT)) for page in PAGES if "<!-- table:" in page.read_text()}
    assert marked == set(tables.PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    local = [target for target in targets if not target.startswith("http")]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing


def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes-w4a8").mkdir()  # of the commands above it
    (tmp_path / "shapes-w4a8" / "model_index.json").write_text("{}")
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "quickstart.md").read_text(), flags=re.DOTALL)
    assert code is not None
    names: dict[str, object] = {}
    example = code.group(1).replace('"s2q-table-w4a8"', '"rtn-w4a8"')  # the same path in seconds, not minutes
    assert example != code.group(1)
    exec(compile(example, "quickstart.md", "exec"), names)
    assert len(names["video"]) == 9


def test_what_the_questions_say_of_diffusers_is_true(tmp_path, monkeypatch):
    from diffusers import CogVideoXVideoToVideoPipeline

    import s2q

    s2q.quantize("shapes-cogvideox", recipe="rtn-w4a6", out=tmp_path / "shapes-w4a6")
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "faq.md").read_text(), flags=re.DOTALL)
    assert code is not None
    names: dict[str, object] = {}
    exec(compile(code.group(1), "faq.md", "exec"), names)
    assert isinstance(names["other"], CogVideoXVideoToVideoPipeline)
    for refused in (CogVideoXVideoToVideoPipeline.from_pipe, lambda pipe: pipe.to("cpu", torch.bfloat16)):
        with pytest.raises(ValueError, match="Casting a quantized model to a new `dtype` is unsupported"):
            refused(names["pipe"])


def test_the_two_commands_come_first():
    code = re.search(r"```\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert code is not None
    commands = [line.split("#")[0].strip() for line in code.group(1).splitlines()]
    assert commands == ["make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{name}:", makefile, flags=re.MULTILINE) for name in ("demo", "test"))


def test_every_recipe_command_of_the_docs_is_valid():
    from s2q.recipes.load import load_recipe, recipe_names

    page = (ROOT / "docs" / "recipes.md").read_text()
    commands = re.findall(r"^s2q quantize (.*?[^\\])$", page, flags=re.MULTILINE | re.DOTALL)
    assert len(commands) == 17
    for command in commands:
        name = re.search(r"-r (\S+)", command)
        assert name is not None
        recipe = load_recipe(name.group(1), overrides=re.findall(r"--set (\S+)", command))
        assert recipe.calibrates == ("0-rounding" not in command)
    assert all(f"`{name}`" in page for name in recipe_names())
    examples = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert [load_recipe(safe_load(example)).rounding.method for example in examples] == ["gptq", "gptq"]


def test_what_to_choose_exists():
    from fnmatch import fnmatch

    from s2q.recipes.load import recipe_names

    page = (ROOT / "docs" / "choose.md").read_text()
    named = set(re.findall(r"`((?:s2q|table|q-vdit)(?:-[a-z]+)*-(?:w\da\d+|\*))`", page))
    assert {"s2q-table-w4a8", "s2q-plus-w4a8", "table-w4a8", "s2q-export-*"} <= named
    assert [name for name in named if not any(fnmatch(known, name) for known in recipe_names())] == []
