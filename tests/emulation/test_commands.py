"""Every command with `--device`, on every GPU, against the same command on the CPU."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from emulation import emulator, runs
from s2q.cli import run

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("no_encoding")]

SIZES = ["--num-frames", "9", "--height", "16", "--width", "16", "--steps", "2"]


@pytest.fixture(scope="module")
def checkpoint():
    return runs.on_cpu("cogvideox", "rtn-w4a6").folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("red\na blue square\n")
    return file


def succeed(*arguments):
    assert run([str(one) for one in arguments]) == 0


def test_generate(each_device, checkpoint, tmp_path):
    for place in (each_device, "cpu"):
        out = tmp_path / place
        succeed("generate", "-m", checkpoint, "--prompt", "red", "-o", out, "--save-latents", *SIZES, "--device", place)
    videos, expected = (load_file(tmp_path / place / "latents.safetensors") for place in (each_device, "cpu"))
    for name, latents in videos.items():
        assert runs.relative_error(latents, expected[name]) <= runs.DIGITS


def test_eval(each_device, checkpoint, prompts, tmp_path):
    results = {}
    for place in (each_device, "cpu"):
        out = tmp_path / f"{place}.json"
        models = ["-m", checkpoint, "--reference", runs.model_folder("cogvideox"), "--prompts", prompts]
        succeed("eval", *models, "--seeds", 1, "-o", out, *SIZES, "--device", place)
        results[place] = json.loads(out.read_text())["metrics"]
    for name, metric in results["cpu"].items():
        mean = results[each_device][name]["mean"]
        assert mean == metric["mean"] or mean == pytest.approx(metric["mean"], rel=0.1), name


@pytest.mark.kernels
def test_doctor(each_device, capsys):
    assert run(["doctor", "--device", each_device, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    (device,) = content["devices"]
    assert (device["name"], device["device"], device["memory_bytes"] > 0) == (each_device, "cuda", True)
    rows = {row["backend"]: row for row in content["backends"]}
    assert rows["triton"]["status"] == rows["reference"]["status"] == rows["fastest"]["status"] == "passed"
    assert rows["triton"]["tests"] == 9
    assert "expected one on the CPU" in rows["cpu"]["reason"]


def compare(out, device, prompts, *arguments):
    reference = ["-m", runs.model_folder("cogvideox"), "--prompts", prompts, "--seeds", 1]
    succeed("compare", "rtn-w4a6", "rtn-w8a8", *reference, "-o", out, *SIZES, "--device", device, *arguments)
    result = json.loads((out / "compare.json").read_text())
    return {entry["label"]: entry["metrics"]["velocity_relative_error"]["mean"] for entry in result["entries"]}


def test_compare(each_device, prompts, tmp_path):
    found, expected = (compare(tmp_path / place, place, prompts) for place in (each_device, "cpu"))
    assert found == pytest.approx(expected, rel=0.1)


def test_processes_of_compare_share_the_gpus(prompts, tmp_path, monkeypatch):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    if emulator.is_installed():
        here = Path(__file__).parent
        folders = (here / "in_workers", here.parent, *os.environ.get("PYTHONPATH", "").split(os.pathsep))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
    many = tmp_path / "prompts.txt"
    many.write_text("".join(f"scene {number}\n" for number in range(6)))
    found = compare(tmp_path / "cuda", "cuda", many, "--workers", 2)
    assert found == pytest.approx(compare(tmp_path / "cpu", "cpu", many), rel=0.1)


def test_bench(device, tmp_path):
    """On emulated GPUs without the denoising step, whose profile takes a minute there."""
    ops = {"linear", "activation_path", "gemm", "attention_colsum", "calibration_block"}
    if not emulator.is_installed():
        ops.add("denoising_step")
    out = tmp_path / "bench.json"
    short = ["--repeats", 1, "--seconds", 0, "--tokens", 64, "--ops", ",".join(sorted(ops))]
    model = ["-m", runs.model_folder("cogvideox"), "-r", "s2q-w4a6"]
    succeed("bench", *model, *short, "--device", device, "-o", out)
    content = json.loads(out.read_text())
    assert content["hardware"]["device"] == "cuda"
    assert {one["op"] for one in content["results"]} == ops
    for one in content["results"]:
        assert one["milliseconds"] > 0, one
        assert one["peak_memory_bytes"] > 0, one


@pytest.mark.parametrize("recipe", ["rtn-w4a6", "s2q-plus-w4a6", "vidit-q-mp-w4a6"])
def test_plan_with_a_measurement(recipe, device, prompts, capsys):
    quick = [part for change in runs.quick(recipe) for part in ("--set", change)]
    model = ["-m", runs.model_folder("cogvideox"), "-r", recipe, *quick, "--prompts", prompts]
    succeed("plan", *model, "--measure", "--json", "--device", device)
    stages = {one["name"]: one for one in json.loads(capsys.readouterr().out)["stages"]}
    assert stages["blocks"]["seconds"] > 0
