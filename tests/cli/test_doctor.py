"""`s2q doctor`, the versions and shell completion."""

import functools
import json
import os
import subprocess
import sys

import imageio_ffmpeg
import pytest
import torch

from s2q.benchmark import diagnosis
from s2q.benchmark.self_test import OPS
from s2q.cli import run
from s2q.ops import fused, level_values


@pytest.fixture
def tested_once(monkeypatch):
    """The self-tests of a device run in its first diagnosis of a test; they take a second."""
    monkeypatch.setattr(diagnosis, "self_tests", functools.cache(diagnosis.self_tests))


@pytest.fixture
def untested(monkeypatch):
    """No self-tests."""
    monkeypatch.setattr(diagnosis, "self_tests", lambda device: [])


def diagnosed(capsys, *arguments, code=0):
    assert run(["doctor", *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_doctor_shows_devices_backends_versions_and_needs(tested_once, capsys):
    content = diagnosed(capsys, "--device", "cpu")
    assert (content["schema_version"], content["passed"]) == (1, True)
    (device,) = content["devices"]
    assert (device["name"], device["memory_bytes"] > 0) == ("cpu", True)
    rows = {row["backend"]: row for row in content["backends"]}
    ops = sum("cpu" in case.backends for case in OPS.values())
    assert (rows["cpu"]["status"], rows["cpu"]["passed"], rows["cpu"]["tests"]) == ("passed", ops, ops)
    assert content["versions"]["torch"] == torch.__version__
    assert {need["name"] for need in content["needs"]} == set(diagnosis.NEEDS)
    assert len(content["self_tests"]) == sum(
        len(case.backends) - ("reference" in case.backends) for case in OPS.values()
    )
    assert run(["doctor", "--device", "cpu"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert device["instruction_set"] in shown
    assert f"cpu cpu passed {ops} of {ops}" in shown


@pytest.mark.slow
def test_a_failed_self_test_ends_with_exit_code_1_and_names_it(capsys, monkeypatch):
    monkeypatch.setitem(level_values.BACKENDS, "cpu", lambda levels, packed, *args, **kwargs: packed)
    assert run(["doctor", "--device", "cpu", "--json"]) == 1
    captured = capsys.readouterr()
    content = json.loads(captured.out)
    (row,) = [row for row in content["backends"] if row["status"] == "failed"]
    assert (content["passed"], row["backend"], row["passed"]) == (False, "cpu", row["tests"] - 1)
    assert "backend 'cpu' on cpu fails its self-test: level_values: got shape" in captured.err
    assert len(captured.err.splitlines()) == 1


def test_what_is_missing_is_listed_with_its_remedy(untested, capsys, monkeypatch):
    def missing():
        raise RuntimeError("No ffmpeg exe could be found")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", missing)
    monkeypatch.setattr(fused, "compiled", lambda: (None, "no C compiler"))
    monkeypatch.setattr(diagnosis, "is_installed", lambda name: name != "ray")
    monkeypatch.setattr(diagnosis.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    needs = {need["name"]: need["obstacle"] for need in diagnosed(capsys, "--device", "cpu")["needs"]}
    assert {name for name, obstacle in needs.items() if obstacle} == {"CUDA", "C compiler", "ffmpeg", "ray"}
    assert needs["CUDA"].endswith("is built for CPUs only")
    assert run(["doctor", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (ray,) = [line for line in lines if line.startswith("not installed (optional): ray, for --engine ray")]
    assert ray.endswith("pip install 's2q[ray]'")
    assert any(line.startswith("missing: CUDA (PyTorch ") for line in lines)
    assert "nothing is missing" not in lines
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert diagnosis.NEEDS["CUDA"].obstacle() == "PyTorch finds no GPU with CUDA_VISIBLE_DEVICES="


def test_nothing_is_missing_where_all_is_installed_and_no_gpu_needs_triton(untested, capsys, monkeypatch):
    monkeypatch.setattr(fused, "compiled", lambda: (None, None))
    monkeypatch.setattr(diagnosis, "is_installed", lambda name: name != "triton")
    monkeypatch.setattr(diagnosis.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(["doctor", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "nothing is missing"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert diagnosis.NEEDS["triton"].obstacle() == "not installed"


def test_all_devices_are_tested_by_default(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert diagnosis.all_devices() == ["cpu", "cuda:0", "cuda:1"]


@pytest.mark.parametrize(("device", "code"), [("gpu", 2), ("cuda:99", 4)])
def test_a_device_that_is_not_here_is_refused(capsys, device, code):
    assert run(["doctor", "--device", device]) == code
    assert device in capsys.readouterr().err


def test_versions_for_people_and_for_programs(capsys):
    assert run(["--version"]) == 0
    line = capsys.readouterr().out
    assert line.startswith("s2q 0.")
    assert f"torch {torch.__version__}" in line
    for arguments in (["--version", "--json"], ["--json", "--version"]):
        assert run(arguments) == 0
        content = json.loads(capsys.readouterr().out)
        assert content["versions"]["torch"] == torch.__version__
        assert set(content["versions"]) == {"python", "s2q", "torch", "diffusers", "transformers", "triton"}


def test_json_before_a_command_is_refused(capsys):
    for arguments in (["--json"], ["--json", "plan", "-m", "x"]):
        assert run(arguments) == 2
        assert "put it after the command" in capsys.readouterr().err


def test_a_shell_completes_commands_and_options_without_torch():
    command = [sys.executable, "-X", "importtime", "-m", "s2q"]
    named = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # make runs the tests in sh
    shown = [*command, "--show-completion", "bash"]
    script = subprocess.run(shown, env=named, capture_output=True, text=True, check=True).stdout
    assert "_S2Q_COMPLETE=complete_bash" in script
    for words, index, expected in (("s2q qu", "1", {"quantize"}), ("s2q doctor --de", "2", {"--device"})):
        environment = {**os.environ, "_S2Q_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": index}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert set(done.stdout.split()) == expected
        assert not any(line.endswith((" torch", " diffusers")) for line in done.stderr.splitlines())
