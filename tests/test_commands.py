"""Every command of README.md and docs/ is understood and runs as `page_commands` declares, in the order of its page."""

import ast
import inspect
import re
import shlex

import pytest
import typer

import page_commands
import s2q
from fake_vbench import write_fake
from page_commands import ADDED, NOT_RUN, PAGES, REPLACED, ROOT, Command, commands, inline_commands
from s2q.cli.app import app

COMMANDS = {page.name: list(commands(page)) for page in PAGES}
ALL = [command for listed in COMMANDS.values() for command in listed]
WITH_RUNS = [name for name, listed in COMMANDS.items() if any(command.is_run for command in listed)]
ENDING = ("plan", "quantize", "generate", "eval", "compare", "bench", "inspect", "export", "convert", "doctor")
"""Commands of s2q that end by themselves and write to no other machine."""
PROGRAMS = typer.main.get_command(app).commands


@pytest.fixture
def any_device(monkeypatch):
    """Devices of the pages need not be here."""
    monkeypatch.setattr("s2q.common.arguments.check_device", lambda name: None)


def parsed(words):
    return PROGRAMS[words[0]].make_context(words[0], list(words[1:])).params


def check(listed):
    """A page's commands that are run are s2q's, and use what tests or the commands above them make."""
    made = set()
    for command in listed:
        if command.is_run:
            program, *words = command.runnable()
            if (program, words[0]) != ("python", "benchmarks/reproduce"):
                assert program == "s2q", f"{command}: not run; add it to page_commands.NOT_RUN, with the reason"
                assert words[0] in ENDING, f"{command}: add it to page_commands.NOT_RUN, with the reason"
                unknown = page_commands.unknown_names(words, made)
                assert not unknown, f"{command}: add {unknown} to page_commands.MODELS or CHECKPOINTS"
                made |= {str(value) for name, value in parsed(words).items() if name == "out"}


@pytest.mark.parametrize("page", COMMANDS)
def test_every_command_of_the_page_is_run_or_listed_with_the_reason(page):
    check(COMMANDS[page])


@pytest.mark.parametrize(
    "text",
    ["s2q plan -m acme/new -r table-w4a8", "s2q ui shapes-w4a6", "s2q push CHECKPOINT acme/name", "curl x", "make x"],
)
def test_a_new_command_has_to_be_listed(text):
    with pytest.raises(AssertionError, match="page_commands"):
        check([Command("choose.md", text)])


def test_every_difference_from_the_pages_has_a_reason_and_is_used():
    assert all(entry[-1] for entry in (*NOT_RUN, *REPLACED, *ADDED))
    names = [f"{command.page}: {command.text}" for command in ALL]
    assert [pattern for pattern, _ in NOT_RUN if not any(re.match(pattern, name) for name in names)] == []
    texts = [command.text for command in ALL if command.is_run]
    assert [pattern for pattern, _, _ in REPLACED if not any(re.search(pattern, text) for text in texts)] == []
    assert [pattern for pattern, _, _ in ADDED if not any(re.match(pattern, text) for text in texts)] == []


@pytest.mark.parametrize("page", COMMANDS)
def test_the_command_line_understands_every_command(page, any_device):
    for command in COMMANDS[page]:
        words = shlex.split(command.text)
        if words[0] == "s2q" and "…" not in words:
            assert parsed(words[1:]), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_text_have_options_scripts_and_targets_that_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    for text in inline_commands(page):
        program, *words = shlex.split(text)
        if program == "make":
            assert re.search(rf"^{words[0]}:", makefile, flags=re.MULTILINE), text
        elif program == "python" and words[0] != "-m":
            assert (ROOT / words[0]).exists(), text
        elif program == "s2q" and not words[0].startswith("-"):
            options = {name for option in PROGRAMS[words[0]].params for name in option.opts}
            used = {word.partition("=")[0] for word in words if word.startswith("-")}
            assert used <= options | {"--help"}, text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_calls_functions_of_s2q_with_arguments_that_they_have(page):
    for code in page_commands.python_code(page):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Call) and re.match(r"s2q\.\w+$", name := ast.unparse(node.func)):
                named = {keyword.arg for keyword in node.keywords}
                assert named <= inspect.signature(getattr(s2q, name[4:])).parameters.keys(), ast.unparse(node)


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_RUNS)
def test_every_command_of_the_page_runs_in_the_order_of_the_page(page, embedded_tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(write_fake(tmp_path / "packages")))
    for command in COMMANDS[page]:
        if command.is_run:
            assert page_commands.run(command) == 0, (command.text, capsys.readouterr().err)
