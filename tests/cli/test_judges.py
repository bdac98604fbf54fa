"""`s2q eval` with learned judges and VBench (a stand-in in a subprocess of this interpreter)."""

import importlib
import json
import sys

import pytest

from fake_vbench import write_fake
from s2q.cli import run
from s2q.cli.output import show_evaluation
from tiny_judges import save_tiny_clip

SMALL = ["--device", "cpu", "--steps", "1", "--num-frames", "9", "--height", "32", "--width", "32", "--seeds", "1"]


@pytest.fixture
def base(checkpoint, tiny_model, tmp_path, monkeypatch):
    """Flags of an evaluation of two prompts, and VBench's stand-in on the path."""
    monkeypatch.setenv("PYTHONPATH", str(write_fake(tmp_path / "fake")))
    monkeypatch.delenv("FAKE_VBENCH", raising=False)
    (tmp_path / "prompts.txt").write_text("a red circle\nup/down\n")
    flags = ["eval", "-m", checkpoint, "--reference", tiny_model, "--prompts", tmp_path / "prompts.txt"]
    return [str(flag) for flag in (*flags, "-o", tmp_path / "out/eval.json", *SMALL)]


def test_vbench_and_clip_beside_the_rest(base, tmp_path, capsys):
    clip = save_tiny_clip(tmp_path / "clip")
    arguments = [*base, "--clip", str(clip), "--vbench-python", sys.executable, "--metrics", "ssim,clipsim"]
    arguments += ["--vbench-dims", "subject_consistency,overall_consistency"]
    assert run([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "out/eval.json").read_text()) == result
    assert set(result["vbench"]["dimensions"]) == {"subject_consistency", "overall_consistency"}
    videos = tmp_path / "out/eval-vbench"
    sizes = [(videos / "model" / f"{index:04d}-0.mp4").stat().st_size for index in range(2)]
    score = result["vbench"]["dimensions"]["subject_consistency"]["model"]
    assert score == pytest.approx(100 * sum(1 / size for size in sizes) / 2)
    assert {path.name for path in (videos / "reference").iterdir()} == {"0000-0.mp4", "0001-0.mp4"}
    assert set(result["evalcrafter"]) == {"clipsim", "absent"}
    assert json.loads((videos / "vbench.json").read_text())["complete"]

    assert run(arguments) == 3
    assert "exists; pass --overwrite" in capsys.readouterr().err
    assert run([*arguments, "--overwrite"]) == 0
    shown = capsys.readouterr().out
    assert "VBench" in shown
    assert "subject consistency" in shown
    assert "VQA-Technical: needs DOVER" in shown


def test_a_failing_vbench_leaves_the_rest(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_VBENCH", "fail")
    arguments = [*base, "--metrics", "ssim", "--vbench-python", sys.executable, "--vbench-dims", "overall_consistency"]
    assert run(arguments) == 1
    assert "the weights are of another model" in capsys.readouterr().err
    assert "vbench" not in json.loads((tmp_path / "out/eval.json").read_text())
    assert (tmp_path / "out/eval-vbench/reference/0000-0.mp4").exists()


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--vbench-dims", "scene"], 2, "--vbench-dims: needs --vbench-python"),
        (["--vbench-cache", "."], 2, "--vbench-cache: needs --vbench-python"),
        (["--vbench-python", sys.executable, "--vbench-dims", "scenery"], 3, "nearest names are scene"),
        (["--vbench-python", "no-such-python"], 3, "no such program"),
        (["--vbench-python", sys.executable, "--num-frames", "1"], 3, "at least 3 frames, got 1; raise --num-frames"),
        (["--clip", "no-such-folder"], 3, "not a folder with a CLIP model"),
        (["--lpips-weights", "no-such-file"], 3, "no such weight file"),
        (["--metrics", "lpips"], 3, "metric lpips: needs --lpips-weights"),
    ],
)
def test_what_cannot_work_is_refused_at_once(base, tmp_path, monkeypatch, capsys, flags, code, message):
    judging = importlib.import_module("s2q.evaluation.measure")
    monkeypatch.setattr(judging, "load_pipeline", lambda *args, **options: pytest.fail("loaded a model"))
    assert run([*base, *flags]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_papers_scores_stand_beside_those_of_its_models(capsys):
    scores = {"model": 50.0, "reference": 60.0}
    vbench = {"version": "0.1.5", "dimensions": {"scene": scores, "object_class": scores}, "notes": ["few"]}
    evaluation = {"model": "q", "reference": "zai-org/CogVideoX-2b", "n_prompts": 1, "n_seeds": 1, "noise_floor": None}
    evaluation |= {"metrics": {}, "vbench": vbench, "evalcrafter": {"clipsim": {"model": 0.2, "reference": 0.3}}}
    show_evaluation(evaluation, scheme="w4a6")
    rows = {line.split("  ")[0].strip(): line.split() for line in capsys.readouterr().out.splitlines()}
    assert rows["scene"][1:] == ["50.00", "60.00", "32.70", "33.79"]
    assert rows["object class"][2:] == ["50.00", "60.00", "–", "–"]
    assert rows["CLIPSIM (EvalCrafter)"][2:] == ["0.2000", "0.3000", "0.1838", "0.1844"]
    show_evaluation(evaluation | {"reference": "somewhere/else"}, scheme="w4a6")
    assert "paper" not in capsys.readouterr().out
