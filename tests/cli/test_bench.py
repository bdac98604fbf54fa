import json
import subprocess
import sys

import pytest

from s2q.benchmark import bench
from s2q.cli import run

QUICK = ["--repeats", "1", "--seconds", "0", "--device", "cpu"]


@pytest.fixture
def results(tiny_model, tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert run(["bench", "-m", str(tiny_model), "-o", str(out), "-r", "s2q-w4a6", *QUICK, "--json"]) == 0
    return out, capsys.readouterr()


def test_a_run_writes_every_op_and_a_second_run_measures_nothing(results, tiny_model, monkeypatch, capsys):
    out, captured = results
    content = json.loads(captured.out)
    assert json.loads(out.read_text()) == content
    assert content["schema_version"] == 1
    assert {one["op"] for one in content["results"]} == {
        "linear",
        "activation_path",
        "gemm",
        "attention_colsum",
        "denoising_step",
        "calibration_block",
    }
    before = out.read_bytes()

    def run_cases(cases, *_args, **_kwargs):
        assert cases == []

    monkeypatch.setattr(bench, "run_cases", run_cases)
    assert run(["bench", "-m", str(tiny_model), "-o", str(out), "-r", "s2q-w4a6", *QUICK]) == 0
    captured = capsys.readouterr()
    assert "already has all results" in captured.err
    for expected in ("108×64×256", "s2q-w4a6", "baseline", "denoising_step", "Where the time of a denoising step goes"):
        assert expected in captured.out
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--ops", "linear,gem"], 3, "nearest names are gemm"),
        (["--backend", "tritn"], 3, "nearest names are triton"),
        (["-m", "synthetic:cogvideox-7b"], 3, "nearest names are cogvideox-"),
        (["-m", "shapes-cogvide"], 3, "nearest names are shapes-cogvideox"),
        (["-r", "s2q-w4a7"], 3, "s2q has the widths w3a6, w4a4"),
        (["--device", "gpu"], 2, "expected auto, cpu, cuda"),
        (["--device", "cuda:99"], 4, "device='cuda:99': "),
        (
            ["--device", "mps"],
            2,
            "--device mps: expected auto, cpu, cuda or cuda:N; got an Apple GPU, which is not supported",
        ),
        (["--tokens", "0"], 2, "--tokens"),
        (["--ops", "calibration_block", "-r", "rtn-w4a6"], 3, "nothing to measure"),
        (["--attention", "sagge"], 3, "nearest names are sage"),
        (["--attention", "flash"], 4, "attention backend 'flash' cannot run here"),
        (["-o", "folder"], 3, "is a folder"),
        (["-o", "file.txt/bench.json"], 3, "cannot be written"),
        (["-o", "file.txt"], 3, "choose another file"),
    ],
)
def test_bad_input_is_one_line_before_any_compute(tmp_path, monkeypatch, capsys, arguments, code, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "run_cases", None)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").write_text("notes")
    assert run(["bench", *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert expected in captured.err
    assert len(captured.err.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.txt", "folder"]


def test_help_needs_nothing_heavy():
    code = (
        "import sys; from s2q.cli import run\n"
        "print(run(['bench', '--help']), {'torch', 'diffusers', 'numpy', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 set()"
