import importlib
import json

import imageio_ffmpeg
import pytest
import safetensors.torch

from s2q.cli import run
from s2q.planning import Machine

FAST = ["--steps", "2", "--guidance-scale", "2", "--device", "cpu"]


def output_of(capsys, arguments, code=0):
    assert run([str(argument) for argument in arguments]) == code, capsys.readouterr().err
    return capsys.readouterr()


def json_of(capsys, arguments, code=0):
    captured = output_of(capsys, [*arguments, "--json"], code)
    content = json.loads(captured.out)
    assert content["schema_version"] == 1
    return content


def test_plan_quantize_inspect_agree(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Machine, "process_bytes", 10**9)  # this process grows from command to command
    out = tmp_path / "q"
    planned = json_of(capsys, ["plan", "-m", tiny_model, "-r", "rtn-w4a8", "--set", "skip=['*.ff.*']"])
    command = ["quantize", "-m", tiny_model, "-r", "rtn-w4a8", "-o", out, "--set", "skip=['*.ff.*']", "--device", "cpu"]
    dry = json_of(capsys, [*command, "--dry-run"])
    assert dry == planned
    assert not out.exists()
    done = json_of(capsys, command)
    inspected = json_of(capsys, ["inspect", out, "--verify"])
    assert inspected["verified"] is True
    assert planned["storage"]["quantized_bytes"] == inspected["storage"]["quantized_bytes"]
    assert done["storage"] == planned["storage"]
    assert {layer["name"] for layer in inspected["layers"]} == {
        layer["name"] for layer in planned["layers"] if layer["scheme"].startswith("w")
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--device-memory", "24GB"], ("cuda", 24 * 10**9)),  # whether or not there is one
        (["--device", "cuda:1", "--device-memory", "24GiB"], ("cuda:1", 24 * 2**30)),
        (["--device", "cpu", "--device-memory", "8GB"], ("cpu", 8 * 10**9)),
    ],
)
def test_a_plan_is_for_the_device_that_is_described(tiny_model, capsys, given, expected):
    device = json_of(capsys, ["plan", "-m", tiny_model, "-r", "rtn-w4a6", *given])["device"]
    assert (device["name"], device["memory_bytes"]) == expected


@pytest.mark.parametrize(
    ("command", "given", "expected"),
    [
        ("plan", ["--memory-budget", "lots"], "--memory-budget: got 'lots'; expected a size"),
        ("plan", ["--device-memory", "0"], "--device-memory: got '0'"),
        ("plan", ["--device", "tpu9", "--device-memory", "8GB"], "--device tpu9: expected auto, cpu, cuda"),
        ("quantize", ["--memory-budget", "lots"], "--memory-budget: got 'lots'; expected a size"),
        ("quantize", ["--device", "tpu9"], "--device tpu9: expected auto, cpu, cuda"),
        ("quantize", ["--device", "xpu"], "--device xpu: expected auto, cpu, cuda or cuda:N; got an Intel GPU, which"),
    ],
)
def test_a_machine_that_makes_no_sense_is_named_by_its_option(tiny_model, tmp_path, capsys, command, given, expected):
    out = ["-o", str(tmp_path / "q")] if command == "quantize" else []
    assert run([command, "-m", str(tiny_model), "-r", "rtn-w4a6", *out, *given]) != 0
    assert expected in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_quantize_ends_with_the_next_commands(tiny_model, tmp_path, capsys):
    out = tmp_path / "my model"
    for recipe, same in (("rtn-w4a6", True), ("rtn-w4a8", False)):
        shown = output_of(
            capsys, ["quantize", "-m", tiny_model, "-r", recipe, "-o", out, "--device", "cpu", "--overwrite"]
        )
        assert f"next: s2q generate -m '{out}' --prompt TEXT -o videos\n" in shown.err
        assert f" s2q eval -m '{out}' --reference {tiny_model} --prompts FILE -o eval.json\n" in shown.err
        assert ("rtn-w4a8 has the same bytes and products as rtn-w4a6, with 8-bit inputs" in shown.err) == same


def test_samples_is_short_for_the_recipe_field(tiny_model, tmp_path, capsys):
    command = [
        "quantize",
        "-m",
        tiny_model,
        "-r",
        "rtn-w4a6",
        "-o",
        tmp_path / "q",
        "--prompts",
        tmp_path / "prompts.txt",
    ]
    (tmp_path / "prompts.txt").write_text("a circle\na square\n")
    small = ["--set", "transforms.scale=smooth", "--set", "calibration.steps=2", "--samples", "3", "--device", "cpu"]
    done = json_of(capsys, [*command, *small])
    assert done["selection"]["samples"] == 3
    assert len(done["selection"]["calls"]) == 3


def test_generation_settings_are_short_for_recipe_fields(tiny_model, tmp_path, capsys):
    given = {"steps": "3", "guidance-scale": "2.5", "num-frames": "9", "negative-prompt": "ugly: 'a', 🎈 [b"}
    given |= {"scheduler": "CogVideoXDPMScheduler", "height": "16", "width": "32", "max-sequence-length": "96"}
    options = [word for name, value in given.items() for word in (f"--{name}", value)]
    planned = json_of(capsys, ["plan", "-m", tiny_model, "-r", "s2q-w4a6", *options])
    assert planned["generation"] == {
        "num_frames": 9,
        "height": 16,
        "width": 32,
        "num_inference_steps": 3,
        "guidance_scale": 2.5,
        "scheduler": "CogVideoXDPMScheduler",
        "shift": None,
        "negative_prompt": "ugly: 'a', 🎈 [b",
        "max_sequence_length": 96,
        "branches": 2,
    }
    shown = output_of(capsys, ["plan", "-m", tiny_model, "-r", "s2q-w4a6", *options]).out
    assert "9 frames of 32 × 16, 3 steps of CogVideoXDPMScheduler, guidance 2.5 in 2 branches, negative" in shown
    (tmp_path / "prompts.txt").write_text("a circle\n")
    command = [
        "quantize",
        "-m",
        tiny_model,
        "-r",
        "s2q-w4a6",
        "-o",
        tmp_path / "q",
        "--prompts",
        tmp_path / "prompts.txt",
    ]
    dry = json_of(capsys, [*command, "--device", "cpu", "--guidance-scale", "1", "--dry-run"])
    assert dry["generation"]["branches"] == 1
    twice = [*command, "--steps", "3", "--set", "calibration.steps=4", "--dry-run"]
    assert "is set before it and would be overwritten; remove one" in output_of(capsys, twice, 3).err


def test_plan_and_inspect_print_tables(tiny_model, checkpoint, capsys):
    shown = output_of(capsys, ["plan", "-m", tiny_model]).out
    for expected in ("times smaller", "20 linears", "transformer_blocks.*.attn1.to_q", "w4a6", "w4a16"):
        assert expected in shown
    shown = output_of(capsys, ["inspect", checkpoint, "--verify"]).out
    assert "every SHA-256 matches" in shown


def test_inspect_names_the_altered_file_and_fails(checkpoint, tmp_path, capsys):
    import shutil

    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    captured = output_of(capsys, ["inspect", copy, "--verify"], 3)
    assert "transformer/diffusion_pytorch_model.safetensors" in captured.err
    assert "transformer/diffusion_pytorch_model.safetensors" in captured.out
    captured = output_of(capsys, ["generate", "-m", copy, "-o", tmp_path / "v", "--prompt", "a", *FAST], 3)
    assert "diffusion_pytorch_model.safetensors" in captured.err
    assert not (tmp_path / "v").exists()


def test_generate_writes_videos_sheet_and_latents(checkpoint, tmp_path, capsys):
    out = tmp_path / "videos"
    arguments = ["generate", "-m", checkpoint, "-o", out, "--prompt", "a red circle", "--prompt", "b", *FAST]
    record = json_of(capsys, [*arguments, "--save-latents", "--seed", "7"])
    assert sorted(path.name for path in out.iterdir()) == [
        "000-a-red-circle.mp4",
        "001-b.mp4",
        "generation.json",
        "latents.safetensors",
        "sheet.png",
    ]
    assert json.loads((out / "generation.json").read_text()) == record
    assert [(entry["prompt"], entry["seed"]) for entry in record["videos"]] == [("a red circle", 7), ("b", 7)]
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(out / "001-b.mp4"))
    assert (frames, record["frame_rate"]) == (9, 8)
    assert seconds == pytest.approx(9 / 8, abs=0.1)
    latents = safetensors.torch.load_file(out / "latents.safetensors")
    assert latents["000-a-red-circle"].shape == (3, 4, 2, 2)
    before = (out / "sheet.png").read_bytes()
    assert "exists; pass --overwrite" in output_of(capsys, arguments, 3).err
    assert (out / "sheet.png").read_bytes() == before
    output_of(capsys, [*arguments, "--overwrite", "--seed", "8", "--fps", "24"])
    _frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(out / "001-b.mp4"))
    assert seconds == pytest.approx(9 / 24, abs=0.1)
    assert (out / "sheet.png").read_bytes() != before
    assert not (out / "latents.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["videos"], "nothing hidden is left"


def test_outputs_are_checked_before_anything_is_loaded(checkpoint, tmp_path, monkeypatch, capsys):
    def load(*_args, **_kwargs):
        raise AssertionError("loaded a model although the output will not do")

    judging = importlib.import_module("s2q.evaluation.measure")
    monkeypatch.setattr("s2q.generation.load.load_pipeline", load)
    monkeypatch.setattr(judging, "load_pipeline", load)
    (tmp_path / "videos").mkdir()
    (tmp_path / "eval.json").write_text("{}")
    assert (
        "exists" in output_of(capsys, ["generate", "-m", checkpoint, "-o", tmp_path / "videos", "--prompt", "a"], 3).err
    )
    arguments = ["eval", "-m", checkpoint, "--reference", checkpoint, "-o", tmp_path / "eval.json"]
    assert "exists" in output_of(capsys, arguments, 3).err
    blocked = tmp_path / "eval.json" / "deeper"
    assert "cannot be written" in output_of(capsys, ["generate", "-m", "x", "-o", blocked, "--prompt", "a"], 3).err


@pytest.mark.parametrize(("prompt", "out"), [("a\udcff", "videos"), ("a", "vid\udcffeos"), (" ", "videos")])
def test_text_that_is_not_utf_8_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, capsys, prompt, out):
    monkeypatch.setattr("s2q.generation.load.load_pipeline", None)
    arguments = ["generate", "-m", "shapes-cogvideox", "-o", tmp_path / out, "--prompt", prompt]
    error = output_of(capsys, arguments, 3).err
    assert "UTF-8" in error or "is empty" in error
    assert "defect" not in error


def test_overwrite_spares_folders_of_something_else(checkpoint, tmp_path, capsys):
    out = tmp_path / "letters"
    out.mkdir()
    (out / "love.txt").write_text("dear")
    arguments = ["generate", "-m", checkpoint, "-o", out, "--prompt", "a", "--overwrite", *FAST]
    assert "not replaced" in output_of(capsys, arguments, 3).err
    assert (out / "love.txt").read_text() == "dear"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--prompt", ""], "empty"),
        (["--prompt", "x" * 200], "reads 96"),
        (["--prompt", "a", "--num-frames", "10"], "use 9 or 17"),
        (["--prompt", "a", "--height", "20"], "use 16 or 32"),
        (["--prompt", "a", "--steps", "0"], "at least 1"),
        (["--prompt", "a", "--guidance-scale", "nan"], "finite"),
        (["--prompt", "a", "--seed", "-1"], "seed"),
        (["--prompt", "a", "--prompt", "a"], "appears twice"),
        (["--prompt", "a", "--backend", "triton"], "use --backend reference, or auto"),
        (["--prompts", "missing.txt"], "no such prompts file"),
        (["--prompts", "empty.txt"], "contains no prompt"),
        (["--prompts", "twice.txt"], "line 2 repeats the prompt of line 1"),
    ],
)
def test_generate_refuses_bad_input(checkpoint, tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "twice.txt").write_text("a\na\n")
    captured = output_of(capsys, ["generate", "-m", checkpoint, "-o", "out", "--device", "cpu", *arguments], 3)
    assert expected in captured.err
    assert len([line for line in captured.err.splitlines() if line.startswith("error: ")]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "twice.txt"]


def test_eval_writes_the_file_and_shows_it(checkpoint, tiny_model, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "eval.json"
    prompts.write_text("a red circle moving left on a grey background\na cat\n")
    arguments = ["eval", "-m", checkpoint, "--reference", tiny_model, "--prompts", prompts, "-o", out, *FAST]
    content = json_of(capsys, [*arguments, "--seeds", "1"])
    assert json.loads(out.read_text()) == content
    assert (content["n_prompts"], content["n_seeds"]) == (2, 1)
    assert (content["model"], content["reference"]) == (str(checkpoint), str(tiny_model))
    assert 0 < content["metrics"]["velocity_relative_error"]["mean"] < 0.1
    assert content["settings"]["num_inference_steps"] == 2
    before = out.read_bytes()
    assert "exists; pass --overwrite" in output_of(capsys, arguments, 3).err
    assert out.read_bytes() == before
    again = [*arguments, "--seeds", "1", "--metrics", "psnr,velocity", "--overwrite"]
    shown = output_of(capsys, [*again, "--sensitivity", "1"]).out
    assert "PSNR, pooled" in shown
    assert "transformer_blocks.*.attn1.to_q" in shown
    assert json.loads(out.read_text())["sensitivity"]["n_videos"] == 1
    assert "Adherence" not in shown
    assert set(json.loads(out.read_text())["metrics"]) == {
        "psnr_frame_mean_db",
        "psnr_pooled_db",
        "velocity_relative_error",
    }


def test_eval_refuses_bad_input(checkpoint, tiny_model, tmp_path, capsys):
    base = ["eval", "-m", checkpoint, "-o", tmp_path / "e.json", "--device", "cpu"]
    assert "nearest names are psnr" in output_of(capsys, [*base, "--reference", tiny_model, "--metrics", "psrn"], 3).err
    assert "no prompts given" in output_of(capsys, [*base, "--reference", tiny_model], 3).err
    assert "unknown model" in output_of(capsys, [*base, "--reference", "shapes-cogvide"], 3).err
    assert "already quantized" in output_of(capsys, [*base, "--reference", checkpoint], 3).err
    folder = ["eval", "-m", checkpoint, "--reference", tiny_model, "-o", tmp_path]
    assert "is a folder" in output_of(capsys, folder, 3).err
    assert list(tmp_path.iterdir()) == []


def test_an_embedded_model_brings_prompts_and_settings(embedded_tiny, tmp_path, capsys):
    content = json_of(
        capsys,
        ["eval", "-m", embedded_tiny, "--reference", embedded_tiny, "--num-prompts", "2", "--seeds", "1"]
        + ["-o", tmp_path / "e.json", "--device", "cpu"],
    )
    assert content["n_prompts"] == 2
    assert content["settings"]["num_inference_steps"] == 4
    assert content["settings"]["height"] == 32
    assert content["metrics"]["adherence_shape"]["mean"] is not None
    assert content["metrics"]["latent_relative_l2"]["mean"] == 0.0


def test_a_quantized_embedded_model_keeps_its_settings(embedded_tiny, tmp_path, capsys):
    output_of(capsys, ["quantize", "-m", embedded_tiny, "-r", "rtn-w8a8", "-o", tmp_path / "q", "--device", "cpu"])
    arguments = [
        "generate",
        "-m",
        tmp_path / "q",
        "-o",
        tmp_path / "v",
        "--prompt",
        "a",
        "--save-latents",
        "--steps",
        "1",
    ]
    output_of(capsys, arguments)
    latents = safetensors.torch.load_file(tmp_path / "v" / "latents.safetensors")
    assert latents["000-a"].shape == (3, 4, 4, 4), "32 x 32 pixels, as recommended for the embedded model"


@pytest.mark.slow
def test_eval_writes_a_page_of_a_checkpoint_with_what_its_run_recorded(embedded_tiny, tmp_path, capsys):
    fast = ["--set", "calibration.n_prompts=2", "--set", "calibration.samples=3", "--set", "distillation.epochs=1"]
    model = tmp_path / "q"
    output_of(capsys, ["quantize", "-m", embedded_tiny, "-r", "s2q-w4a6", *fast, "-o", model, "--device", "cpu"])
    page = tmp_path / "report.html"
    arguments = ["eval", "-m", model, "--reference", embedded_tiny, "--num-prompts", "5", "--seeds", "2"]
    arguments += ["-o", tmp_path / "e.json", "--page", page, "--device", "cpu", "--workers", "1"]
    said = output_of(capsys, arguments).err
    assert f"{page}" in said
    text = page.read_text()
    assert text.count("data:video/mp4;base64,") == 3 * 4, "four prompts with the first seed"
    for heading in (
        "Selected samples",
        "Loss by block",
        "Attention mass",
        "Attention over frames",
        "Planned and measured",
    ):
        assert heading in text, heading
    assert "exists; pass --overwrite" in output_of(capsys, [*arguments[:-2], "-o", tmp_path / "f.json"], 3).err

    report = model / "s2q/report.json"
    report.write_text(report.read_text().replace('"schema_version": 1', '"schema_version": 9'))
    before = page.read_bytes()
    said = output_of(capsys, [*arguments, "--overwrite", "--no-verify"], 3).err
    assert "report.json: schema_version=9; expected 1 for a report page; upgrade s2q" in said
    assert page.read_bytes() == before, "refused before anything is computed"


def test_eval_writes_a_page_of_a_model_without_a_run(embedded_tiny, tmp_path, capsys):
    page = tmp_path / "report.html"
    arguments = ["eval", "-m", embedded_tiny, "--reference", embedded_tiny, "--num-prompts", "1", "--seeds", "1"]
    output_of(capsys, [*arguments, "-o", tmp_path / "e.json", "--page", page, "--device", "cpu"])
    text = page.read_text()
    assert "No report of a run is in this model" in text
    assert text.count("data:video/mp4;base64,") == 3
