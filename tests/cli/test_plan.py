"""`s2q plan` for a GPU by name, and of several recipes."""

import json

import pytest

from s2q.cli import run

MODEL = "synthetic:wan-1.3b"


def test_a_plan_for_a_gpu_says_that_its_time_is_an_estimate(capsys):
    assert run(["plan", "-m", MODEL, "--device", "H100"]) == 0
    shown = capsys.readouterr().out
    for expected in ("On h100 with 80 GB", "GPU hours (", "Estimated, not measured", "NVIDIA H100"):
        assert expected in shown


def test_recipes_are_compared_in_a_table_and_as_json(capsys):
    arguments = ["plan", "-m", MODEL, "--device", "4090", "--recipes", "s2q-w4a6,rtn-w4a8"]
    assert run(arguments) == 0
    shown = capsys.readouterr().out
    for expected in ("s2q-w4a6", "rtn-w4a8", "GPU hours", "reduction", "measured on embedded models"):
        assert expected in shown
    assert run([*arguments, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [row["recipe"] for row in content["recipes"]] == ["s2q-w4a6", "rtn-w4a8"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "h900"], "--device h900: expected auto, cpu, cuda or cuda:N, or one of h100, h200, a100, b200"),
        (["--device", "h100", "--measure"], "omit --device-memory and the name of a GPU"),
        (["--recipes", "all", "--measure"], "--measure measures one recipe; omit --recipes"),
        (["--recipes", "nothing-w4a4"], "unknown recipe"),
    ],
)
def test_what_cannot_be_planned_is_refused(capsys, arguments, message):
    assert run(["plan", "-m", MODEL, *arguments]) in (2, 3)
    assert message in capsys.readouterr().err.replace("\n", " ")
