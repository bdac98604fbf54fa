import json

from s2q.cli import run
from s2q.engines import options


def test_the_demo_quantizes_evaluates_and_writes_its_page(embedded_tiny, request, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(options, "cpu_count", lambda: 1)  # others would not know of `embedded_tiny`
    out = tmp_path / "demo"
    assert run(["demo", "-o", str(out), "--short", "--no-open", "--json"]) == 0, capsys.readouterr().err
    record = json.loads(capsys.readouterr().out)
    assert record["schema_version"] == 1
    assert json.loads((out / "demo.json").read_text()) == record
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint",
        "demo.json",
        "eval.json",
        "report.html",
        "sheet.png",
        "videos",
    ]
    assert len(list((out / "videos").glob("*.mp4"))) == 8
    evaluation = json.loads((out / "eval.json").read_text())
    assert evaluation["model"] == str(out / "checkpoint")
    assert evaluation["n_prompts"] == 4
    assert evaluation["metrics"]["velocity_relative_error"]["mean"] > 0
    assert evaluation["sensitivity"]["n_videos"] == 2
    page = (out / "report.html").read_text()
    for heading in (
        "<h3>Selected samples",
        "<h3>Loss by block",
        "<h3>Sensitivity",
        "<h3>Attention mass",
        "<h2>Attention over frames",
        '-title">Planned and measured',
    ):
        assert heading in page, heading
    assert page.count('class="tile"') == 3 * (1 + 2 * 2), "three frames of the video and of two blocks, above grey ones"
    assert page.count("data:video/mp4;base64,") == 12
    assert ".partial" not in page, "names in the page are those of the final folder"
    assert run(["inspect", str(out / "checkpoint"), "--verify"]) == 0
    capsys.readouterr()

    assert run(["demo", "-o", str(out), "--short", "--no-open"]) == 3
    assert "pass --overwrite" in capsys.readouterr().err
    request.getfixturevalue("no_encoding")
    assert run(["demo", "-o", str(out), "--short", "--no-open", "--overwrite"]) == 0
    shown = capsys.readouterr().out
    for expected in ("times smaller", "PSNR", "Velocity error", "Adherence", "report.html"):
        assert expected in shown
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_demo_refuses_bad_input(embedded_tiny, tmp_path, capsys):
    assert run(["demo", "-o", str(tmp_path / "a"), "-m", "CogVideoX-2B"]) == 3
    assert "shapes-cogvideox" in capsys.readouterr().err
    assert run(["demo", "-o", str(tmp_path / "a"), "-r", "rtn-w4a7"]) == 3
    assert "rtn has the widths w4a16, w4a4" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("keep")
    assert run(["demo", "-o", str(tmp_path / "mine"), "--overwrite"]) == 3
    assert (tmp_path / "mine" / "file").read_text() == "keep"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
