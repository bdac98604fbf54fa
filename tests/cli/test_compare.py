import json

import pytest

from s2q.cli import run

FAST = ["--num-prompts", "2", "--seeds", "1", "--steps", "2", "--height", "16", "--width", "16"]


@pytest.mark.slow
def test_recipes_after_a_flag_and_as_arguments(embedded_tiny, tmp_path, capsys):
    out = tmp_path / "comparison"
    assert run(["compare", "--recipes", "rtn-w4a6", "rtn-w8a8", "-o", str(out), *FAST]) == 0
    shown = capsys.readouterr().out
    for expected in ("full precision", "w8a8", "rtn-w4a6", "velocity error", "too few", "index.html"):
        assert expected in shown
    assert run(["compare", "-r", "rtn-w4a6,rtn-w8a8", "-o", str(out), "--json", *FAST]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((out / "compare.json").read_text())
    assert {entry["label"] for entry in result["entries"]} == {"rtn-w4a6", "rtn-w8a8"}
    made = str(out / "checkpoints" / "rtn-w4a6")
    assert run(["compare", made, "-m", embedded_tiny, "-o", str(tmp_path / "b"), "--dry-run", *FAST]) == 0
    shown = capsys.readouterr().out
    assert "2 prompts × 1 seed: 4 videos" in shown
    assert f"checkpoint {made}"[:40] in shown
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_a_calibrated_recipe_with_a_smaller_budget(embedded_tiny, tmp_path, capsys):
    arguments = ["compare", "s2q-w4a6", "rtn-w4a6", "-o", str(tmp_path / "out"), "--json", *FAST, "--samples", "2"]
    changes = ["distillation.epochs=1", "calibration.n_prompts=1", "calibration.steps=2"]
    assert run([*arguments, *(word for change in changes for word in ("--set", change))]) == 0, capsys.readouterr().err
    trained, rounded = json.loads(capsys.readouterr().out)["entries"]
    assert trained["calibration"] == {"n_prompts": 1, "samples": 2}
    assert trained["overrides"] == [*changes, "calibration.samples=2"]
    assert rounded["calibration"]["samples"] is None
    assert rounded["overrides"] == []


def test_a_failed_entry_is_an_error_after_everything_else(embedded_tiny, tmp_path, capsys):
    recipe = tmp_path / "groups.yaml"
    recipe.write_text(
        "extends: rtn-w4a4\nname: groups\nweights: {num_bits: 4, granularity: per_group, group_size: 48}\n"
    )
    out = tmp_path / "out"
    assert run(["compare", "rtn-w4a4", str(recipe), "-o", str(out), *FAST]) == 1
    told = capsys.readouterr()
    assert "1 of 2 failed: groups: " in told.err
    assert "failed" in told.out
    assert (out / "index.html").is_file()


def test_compare_refuses_bad_input(embedded_tiny, tmp_path, capsys):
    def refused(code, message, *arguments):
        assert run(["compare", *arguments, "-o", str(tmp_path / "out"), *FAST]) == code
        assert message in " ".join(capsys.readouterr().err.split())

    prompts = tmp_path / "prompts.txt"
    refused(2, "got nothing to compare")
    refused(3, "rtn has the widths w4a16, w4a4", "rtn-w4a7")
    refused(3, "no recipe matches 'foo-*'", "--recipes", "foo-*")
    prompts.write_text("a red circle\n\na red circle\n")
    refused(3, "line 3 repeats the prompt of line 1", "rtn-w4a6", "--prompts", str(prompts))
    prompts.write_text("a red circle\n" + "x" * 200 + "\n")
    refused(3, "prompt 2 of 2 has", "rtn-w4a6", "--prompts", str(prompts))
    refused(3, "prompt 2 of 2 has", "s2q-w4a6", "--calibration-prompts", str(prompts))
    refused(3, "expected key=value", "rtn-w4a6", "--set", "bits")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    refused(3, "was not written by this command", "rtn-w4a6", "--overwrite")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
