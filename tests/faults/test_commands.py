"""Every command that writes, with a full disk or kill -9 at an event: one line, and the next start leaves nothing."""

import errno
import shutil
import signal

import pytest
from reliability import record

from faults.commands import WORKERS
from faults.test_disk import check_refused
from quick import quick

VIDEO = ["--num-frames", "9", "--height", "16", "--width", "16", "--steps", "2"]
SCENE = "a red circle"


@pytest.fixture(scope="module")
def writing(commands, model, tmp_path_factory):
    """The arguments of each command without its output, and the name of the output."""
    checkpoint = tmp_path_factory.mktemp("checkpoint") / "rounded"
    assert commands.run(["quantize", "-m", model, "-r", "rtn-w4a6", WORKERS, "1", "-o", checkpoint]).code == 0
    return {
        "generate": (["generate", "-m", model, "--prompt", "a circle", *VIDEO, "--save-latents", "-o"], "videos"),
        "eval": (
            ["eval", "-m", checkpoint, "--reference", model, *VIDEO, "--prompts", _prompts(checkpoint), "--seeds", "1"]
            + [WORKERS, "1", "--metrics", "psnr", "-o"],
            "eval.json",
        ),
        "compare": (
            ["compare", "rtn-w4a6", "-m", model, *VIDEO, "--prompts", _prompts(checkpoint), "--seeds", "1"]
            + [WORKERS, "1", "--metrics", "psnr", "-o"],
            "compared",
        ),
        "bench": (["bench", "-m", model, "--ops", "linear", "--repeats", "1", "--seconds", "0.1", "-o"], "bench.json"),
    }


def _prompts(checkpoint):
    path = checkpoint.parent / "prompts.txt"
    path.write_text(f"{SCENE}\n")
    return path


def disturb(commands, arguments, name, folder, event, error):
    """Run a command with a fault, then the same one without: it ends well, and only the output is left."""
    outcome = commands.run([*arguments, folder / name], event=event, error=error)
    if outcome.code != 0:
        if error:
            check_refused(outcome, error)
        else:
            assert outcome.code == -signal.SIGKILL
    done = (folder / name).exists()
    outcome = commands.run([*arguments, folder / name])
    assert outcome.code == 0 or (done and outcome.code == 3), outcome
    assert [path.name for path in folder.iterdir()] == [name], (event, outcome)
    assert not [path.name for path in folder.rglob(".*")]


COMMANDS = ["generate", "eval", "compare", "bench"]


@pytest.mark.parametrize("command", quick(COMMANDS, "generate", "bench"))
def test_a_command_ends_with_one_line_on_a_full_disk(commands, writing, tmp_path, command):
    arguments, name = writing[command]
    disturb(commands, arguments, name, tmp_path, 6, errno.ENOSPC)


@pytest.mark.faults
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_ends_with_one_line_on_a_full_disk_and_cleans_after_a_kill(commands, writing, tmp_path, command):
    arguments, name = writing[command]
    events = commands.events([*arguments, tmp_path / name])
    chosen = range(0, len(events), 1 + len(events) // 60)  # a comparison takes seconds
    for error in (errno.ENOSPC, 0):
        for event in chosen:
            folder = tmp_path / f"{error}-{event}"
            folder.mkdir()
            disturb(commands, arguments, name, folder, event, error)
            shutil.rmtree(folder)
    record(f"faults of s2q {command}", {"events": len(events), "full_disk": len(chosen), "kills": len(chosen)})
