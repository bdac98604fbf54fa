"""docs/quickstart.md as a new user types it: the commands of the page in their order, in one folder."""

from pathlib import Path

import pytest
import quickstart
import typer
from huggingface_hub import constants

from hub_server import TOKEN, hub_server
from s2q.cli import run
from s2q.cli.app import app

COMMANDS = [quickstart.runnable(words) for words in quickstart.commands(quickstart.PAGE.read_text())]
FEWER = {"4": "1"}
"""Prompts of evaluations, fewer than on the page."""


def given(words):
    """The arguments of a command as the command line reads them."""
    return typer.main.get_command(app).commands[words[0]].make_context(words[0], words[1:]).params


def test_no_command_of_the_page_writes_what_another_has_written():
    outputs = [str(given(words)[name]) for words in COMMANDS for name in ("out", "page") if given(words).get(name)]
    assert len(outputs) == len(set(outputs)) >= 7


def test_commands_of_the_page_read_what_commands_above_them_have_written():
    written = {"shapes-cogvideox", *quickstart.PROMPTS}
    for words in COMMANDS:
        read = {name: given(words).get(name) for name in ("model", "reference", "evaluation", "videos", "prompts")}
        assert {str(value) for value in read.values() if value is not None} <= written, words
        written |= {str(given(words)[name]) for name in ("out", "repo") if name in given(words)}


def test_the_measured_commands_are_those_of_the_page():
    rows = quickstart.measured()["rows"]
    assert [row["ran"] for row in rows] == COMMANDS


@pytest.mark.slow
def test_every_command_of_the_page_runs_in_the_order_of_the_page(own_arithmetic, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in quickstart.PROMPTS.items():
        Path(name).write_text(text)
    with hub_server() as (address, hub):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for words in COMMANDS:
            if words[0] not in ("demo", "doctor"):  # test_demo.py, test_doctor.py
                assert run([FEWER.get(word, word) for word in words]) == 0, (words, capsys.readouterr().err)
        assert list(hub.repos) == ["acme/shapes-w4a8"]
