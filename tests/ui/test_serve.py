"""What `s2q ui` refuses before a model is loaded."""

import json
import os
import socket
import sys
from types import SimpleNamespace

import pytest

from s2q.cli import run
from s2q.ui import serve


@pytest.fixture
def taken_port():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


@pytest.fixture(autouse=True)
def nothing_is_offered(monkeypatch):
    def refused(*args):
        raise AssertionError("models are looked at after everything else")

    monkeypatch.setattr(serve, "offered", refused)


def refusal(capsys, *arguments):
    code = run(["ui", "--device", "cpu", *arguments])
    (line,) = capsys.readouterr().err.splitlines()
    return code, line


def test_a_port_in_use_ends_with_exit_code_5(capsys, taken_port):
    code, line = refusal(capsys, "--port", str(taken_port))
    assert code == 5
    assert f"--port {taken_port}: in use on 127.0.0.1; stop what uses it, or pass another" in line


def test_a_missing_gradio_ends_with_exit_code_4_and_how_to_install_it(capsys, monkeypatch):
    monkeypatch.setattr(serve, "is_installed", lambda name: name != "gradio")
    code, line = refusal(capsys)
    assert code == 4
    assert "gradio is not installed; pip install 's2q[ui]'" in line


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_a_host_that_is_not_this_machine_ends_with_exit_code_3(capsys, host):
    code, line = refusal(capsys, "--host", host, "--port", "0")
    assert code == 3
    assert f"--host {host}" in line


def test_a_free_port_is_found_for_zero():
    assert serve.free_port("127.0.0.1", 0) > 0


def test_the_address_and_the_models_are_written_as_json(capsys, monkeypatch):
    def served(checkpoints, *, models, ready, **options):
        assert (list(checkpoints), list(models), options["host"], options["share"]) == (
            ["a"],
            ["b"],
            "127.0.0.1",
            False,
        )
        ready("http://127.0.0.1:7860/", ["a", "b"])

    monkeypatch.setattr(serve, "serve", served)
    assert run(["ui", "a", "-m", "b", "--json", "--device", "cpu"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content == {"schema_version": 1, "address": "http://127.0.0.1:7860/", "models": ["a", "b"]}


@pytest.fixture
def launched(monkeypatch):
    """Let a function be what starts the page; the page says whether it was closed."""
    page = SimpleNamespace(closed=False)
    page.close = lambda verbose: setattr(page, "closed", True)

    def launched_by(launch):
        page.launch = launch
        module = SimpleNamespace(STYLE="", theme=lambda: None, build_page=lambda offers, pipelines: page)
        monkeypatch.setitem(sys.modules, "s2q.ui.page", module)
        monkeypatch.setattr(serve, "offered", lambda models, checkpoints: [])
        monkeypatch.setattr(serve, "is_installed", lambda name: True)
        return page

    return launched_by


def test_a_server_that_gradio_cannot_reach_ends_with_exit_code_4(capsys, launched):
    def unreachable(**options):
        raise ValueError("When localhost is not accessible, a shareable link must be created.")

    page = launched(unreachable)
    code, line = refusal(capsys, "--port", "0")
    assert code == 4
    assert "localhost is not accessible" in line
    assert "set NO_PROXY=127.0.0.1,localhost" in line
    assert page.closed


def test_a_missing_public_address_is_said_and_nothing_of_gradio_is_on_stdout(capsys, launched, caplog):
    def without_tunnel(**options):
        sys.stdout.write("Could not create share link.\n")
        return None, "http://127.0.0.1:1/", None

    launched(without_tunnel)
    addresses = []
    serve.serve(share=True, port=0, ready=lambda address, labels: addresses.append(address), until=lambda: True)
    assert addresses == ["http://127.0.0.1:1/"]
    assert "opened no public address; the page is at http://127.0.0.1:1/ only" in caplog.text
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("before", [None, "/elsewhere"])
def test_the_environment_is_afterwards_as_before(launched, monkeypatch, before):
    names = ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY")
    for name in names:
        monkeypatch.delenv(name, raising=False)
        if before is not None:
            monkeypatch.setenv(name, before)
    during = []

    def launch(**options):
        during.extend(os.environ[name] for name in names)
        return None, "http://127.0.0.1:1/", None

    launched(launch)
    serve.serve(port=0, until=lambda: True)
    assert before not in during
    assert [os.environ.get(name) for name in names] == [before] * len(names)
