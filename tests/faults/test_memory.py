"""A limit of address space (RLIMIT_AS): a command ends with its result, or with exit code 4 and one line."""

import re

import pytest
from reliability import record

from faults.commands import WORKERS, hashes
from quick import quick

LARGER = {
    "calibration.num_frames=9": "calibration.num_frames=33",
    "calibration.height=16": "calibration.height=128",
    "calibration.width=16": "calibration.width=128",
}
VIDEO = ("--num-frames", "33", "--height", "128", "--width", "128", "--steps", "2")
LIMITS = [3 << 20, 12 << 20]
MANY = [(1 << 19) + number * (3 << 19) // 2 for number in range(40)]  # 0.5 to 30 MiB


@pytest.fixture(scope="module")
def calibration(quantize_tiny):
    """The arguments of a run whose activations take more memory than the server has free."""
    return [LARGER.get(argument, argument) for argument in quantize_tiny]


@pytest.fixture(scope="module")
def expected(commands, calibration, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    assert commands.run([*calibration, out]).code == 0
    return hashes(out)


@pytest.fixture
def defaults(model):
    """The settings of generation that an embedded model has; any model is one in these processes."""
    path = model / "generation.json"
    before = path.read_text()
    path.write_text('{"num_inference_steps": 2, "guidance_scale": 3.0, "num_frames": 9, "height": 16, "width": 16}')
    yield
    path.write_text(before)


def last_error(outcome):
    """The line that a command ends with."""
    return next(line for line in reversed(outcome.output.splitlines()) if line.strip())


def check_limit(commands, calibration, folder, memory, expected):
    """Quantize under a limit, then without; return how the first ended."""
    outcome = commands.run([*calibration, folder / "out"], memory=memory)
    tried_again = "again with gradient checkpointing" in outcome.output
    if outcome.code != 0:
        assert outcome.code == 4, outcome.output
        assert "out of memory" in last_error(outcome)
        assert not (folder / "out").exists()
        assert commands.run([*calibration, folder / "out"]).code == 0
    assert hashes(folder / "out") == expected
    return {"retries": int(tried_again), "refused": int(outcome.code == 4), "finished": int(outcome.code == 0)}


@pytest.mark.parametrize("memory", quick(LIMITS, 12 << 20))
def test_a_limit_of_memory_ends_with_the_result_or_one_line_and_the_run_resumes(
    commands, calibration, expected, tmp_path, memory
):
    check_limit(commands, calibration, tmp_path, memory, expected)


@pytest.mark.usefixtures("defaults")
def test_generate_without_memory_says_what_to_make_smaller(commands, model, tmp_path):
    arguments = ["generate", "-m", model, "--prompt", "red", *VIDEO, "-o", tmp_path / "out"]
    outcome = commands.run(arguments, memory=2 << 20)
    assert outcome.code == 4, outcome.output
    assert re.search("out of memory while (generating videos; use smaller|it was loaded; use )", last_error(outcome))


@pytest.mark.usefixtures("defaults")
def test_eval_without_memory_says_what_to_make_smaller(commands, model, tmp_path):
    arguments = ["eval", "-m", model, "--reference", model, "--prompts", model.parent / "prompts.txt", *VIDEO]
    outcome = commands.run([*arguments, WORKERS, "1", "-o", tmp_path / "eval.json"], memory=2 << 20)
    assert outcome.code == 4, outcome.output
    assert re.search("out of memory while (evaluating|it was loaded; use )", last_error(outcome))


@pytest.mark.faults
def test_40_limits_of_memory_end_with_the_result_or_one_line(commands, calibration, expected, tmp_path):
    counts = {"limits": 0, "retries": 0, "refused": 0, "finished": 0}
    for number, memory in enumerate(MANY):
        folder = tmp_path / str(number)
        folder.mkdir()
        counts["limits"] += 1
        for key, value in check_limit(commands, calibration, folder, memory, expected).items():
            counts[key] += value
    record("memory_limits", counts)
    assert counts["refused"] > 0
    assert counts["finished"] > 0
