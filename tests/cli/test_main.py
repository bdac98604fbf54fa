import json
import os
import signal
import subprocess
import sys
import time

import pytest

from s2q.cli import LARGE_PAGES, SPINS, WAITING, limit_spinning, run, take_large_pages
from s2q.common.errors import (
    BusyError,
    InvalidInputError,
    ResourceError,
    S2QError,
)
from s2q.common.interrupts import resumable


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (S2QError("it failed"), 1),
        (InvalidInputError("a [bold] name\n  over lines"), 3),
        (ResourceError("no room"), 4),
        (BusyError("another run"), 5),
        (MemoryError("too much"), 4),
        (ValueError("a defect"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes_and_one_line_without_traceback(monkeypatch, capsys, error, code):
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr("s2q.planning.plan", fail)
    assert run(["plan", "-m", "x"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert len(captured.err.splitlines()) == 1
    assert "Traceback" not in captured.err
    assert " ".join(str(error).split()) in captured.err


def test_debug_shows_where_and_may_stand_anywhere(monkeypatch, capsys):
    def fail(*_args, **_kwargs):
        raise InvalidInputError("bad")

    monkeypatch.setattr("s2q.planning.plan", fail)
    assert run(["plan", "-m", "x", "--debug"]) == 3
    assert "Traceback" in capsys.readouterr().err


def test_terminate_unwinds_and_exits_143(monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    unwound = []

    def wait(*_args, **_kwargs):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            unwound.append(True)

    monkeypatch.setattr("s2q.planning.plan", wait)
    assert run(["plan", "-m", "x"]) == 143
    assert unwound == [True]
    assert signal.getsignal(signal.SIGTERM) == before
    assert "terminated" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["quantise"], "Did you mean 'quantize'?"),
        (["plan", "-m", "x", "--recpe", "y"], "--recipe"),
        (["plan"], "--model"),
        (["quantize", "-m", "x", "-r", "y"], "--output"),
        (["generate", "-m", "x", "-o", "y", "--prompt", "a", "--seed", "one"], "--seed"),
        (["generate", "-m", "x", "-o", "y"], "either --prompt or --prompts"),
        (["generate", "-m", "x", "-o", "y", "--prompt", "a", "--prompts", "b"], "either --prompt or --prompts"),
        (["generate", "-m", "x", "-o", "y.mp4", "--prompt", "a"], "remove .mp4"),
        (["generate", "-m", "x", "-o", "y", "--prompt", "a", "--device", "gpu"], "expected auto, cpu, cuda"),
        (["quantize", "-m", "x", "-r", "rtn-w4a6", "-o", "y", "--samples", "4"], "no calibration samples"),
        (["eval", "-m", "x", "--reference", "y", "--seeds", "0"], "--seeds"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert len(captured.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_without_arguments_there_is_help_and_no_error(capsys):
    assert run([]) == 0
    captured = capsys.readouterr()
    assert "Usage: s2q" in captured.out
    assert "quantize" in captured.out
    assert captured.err == ""


def test_help_and_version_need_nothing_heavy():
    code = (
        "import sys; from s2q.cli import run\n"
        "codes = [run(arguments) for arguments in (['--help'], ['eval', '--help'], ['--version'])]\n"
        "print(codes, {'torch', 'diffusers', 'numpy', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[0, 0, 0] set()"
    assert "s2q 0." in done.stdout


def test_the_installed_command_runs():
    done = subprocess.run(
        [sys.executable, "-c", "from s2q.cli import main; main(['plan'])"], capture_output=True, check=False
    )
    assert done.returncode == 2


def test_json_errors_leave_stdout_empty(capsys):
    assert run(["plan", "-m", "shapes-cogvideo", "--json"]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "nearest names are shapes-cogvideox" in captured.err
    with pytest.raises(json.JSONDecodeError):
        json.loads(captured.err)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_a_library_made_its_own_error_is_still_one(number, code, monkeypatch, tmp_path, capsys):
    def build(_arguments):
        with resumable(tmp_path):
            try:
                os.kill(os.getpid(), number)
                time.sleep(5)
            except BaseException as error:
                raise ValueError(f"Error building a serializer: {error}") from error

    monkeypatch.setattr("s2q.cli._invoke", build)
    assert run(["doctor"]) == code
    shown = capsys.readouterr().err
    assert "defect of s2q" not in shown
    assert "run the same command again to resume" in " ".join(shown.split())
    monkeypatch.setattr("s2q.cli._invoke", lambda arguments: 1 / 0)
    assert run(["doctor"]) == 1, "a later command of this process"


@pytest.mark.parametrize("chosen", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "9"}, {"KMP_BLOCKTIME": "1"}])
def test_waiting_threads_sleep_unless_the_user_chose(chosen):
    environment = {"OMP_NUM_THREADS": "2", **chosen}
    limit_spinning(environment)
    assert environment == {"OMP_NUM_THREADS": "2", **(chosen or {"GOMP_SPINCOUNT": SPINS})}


@pytest.mark.parametrize("chosen", [{}, {LARGE_PAGES: "0"}])
def test_large_tensors_get_large_pages_unless_the_user_chose(chosen):
    environment = dict(chosen)
    take_large_pages(environment)
    assert environment == (chosen or {LARGE_PAGES: "1"})


@pytest.mark.slow
def test_the_command_sets_both_before_torch_is_there_and_the_library_never():
    names = [*WAITING, LARGE_PAGES]
    unset = {name: value for name, value in os.environ.items() if name not in names}
    shown = f"[os.environ.get(name) for name in {names[1::2]}]"
    library = f"import os, s2q, s2q.generation.load; print({shown})"
    command = (
        "import os, sys, s2q.cli; s2q.cli.run = lambda arguments: 'torch' in sys.modules;"
        f"sys.exit = lambda loaded: print({shown}, loaded); s2q.cli.main(['--version'])"
    )
    for code, expected in ((library, "[None, None]"), (command, f"['{SPINS}', '1'] False")):
        done = subprocess.run([sys.executable, "-c", code], env=unset, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected
