"""The commands of docs/real-models.md and docs/models/: understood by the command line, and run on tiny pipelines."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import typer
from family_pages import families_of, modes_table, page_names, sizes_and_times_table
from published import planned_peak, published_models, python_of
from reproduce.command import arguments_of

import s2q
from quick import quick
from s2q.cli.app import app
from s2q.models import FAMILIES
from s2q.models.synthetic import synthetic_names
from s2q.recipes.load import load_recipe
from s2q.report.video import encode_mp4
from tiny import moving_square, tiny_pipeline, video_size

DOCS = Path(__file__).parent.parent / "docs"
PAGES = [DOCS / "real-models.md", *sorted((DOCS / "models").glob("*.md"))]
PIPELINES = {
    "CogVideoXPipeline": "cogvideox",
    "HunyuanVideoPipeline": "hunyuanvideo",
    "Kandinsky5T2VPipeline": "kandinsky5",
    "LTXPipeline": "ltx",
    "LTX2Pipeline": "ltx-2",
    "MiniMaxH3Pipeline": "minimax-h3",
    "MochiPipeline": "mochi",
    "SanaVideoPipeline": "sana-video",
    "SkyReelsV2Pipeline": "skyreels-v2",
    "WanAnimatePipeline": "wan-animate image",
    "WanPipeline": "wan",
    "WanVACEPipeline": "wan-vace",
}


def commands(program):
    """The commands of the pages that begin with a program, without comments."""
    pages = "\n".join(page.read_text() for page in PAGES)
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", pages, flags=re.DOTALL | re.MULTILINE)
    text = "\n".join(block for language, block in blocks if not language)
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith(f"{program} ")]


def test_the_page_of_published_models_lists_the_page_and_the_models_of_each_family():
    listed = dict(re.findall(r"^- \[[^]]+\]\(models/([\w.-]+)\): (.*)$", PAGES[0].read_text(), flags=re.MULTILINE))
    assert sorted(listed) == [page.name for page in PAGES[1:]]
    for page in PAGES[1:]:
        models = re.findall(r"^## (.*)$", page.read_text().partition("## Pipelines")[2], flags=re.MULTILINE)
        assert listed[page.name] == ", ".join(models)


def test_every_command_is_understood():
    typed = [words[1:] for words in commands("s2q")]
    read = [typer.main.get_command(app).commands[name].make_context(name, rest).params for name, *rest in typed]
    quantized = [one for one in read if "recipe" in one and "out" in one]
    judged = [one for one in read if "reference" in one]
    assert len(quantized) == len(judged) == len(published_models())
    for one in quantized:
        assert load_recipe(one["recipe"], overrides=one["overrides"] or ()).name == "s2q-w4a6"
    assert [one["reference"] for one in judged] == [one["model"] for one in quantized]
    assert [one["model"] for one in judged] == [str(one["out"]) for one in quantized]


def test_models_are_calibrated_with_the_settings_that_they_are_called_with():
    typed = [words[2:] for words in commands("s2q") if words[1] == "quantize"]
    entries = {entry["hub"]: entry for entry in published_models().values()}
    assert len(typed) == len(entries)
    for words in typed:
        given = typer.main.get_command(app).commands["quantize"].make_context("quantize", words).params
        entry = entries[given["model"]]
        (family,) = (family for family in FAMILIES.values() if family.pipeline_class == entry["pipeline"])
        for name, value in entry["call"].items():
            assert (family.defaults[name] if given[name] is None else given[name]) == value, (entry["title"], name)


def test_the_commands_of_the_papers_tables_are_understood():
    typed = commands("python")
    assert [words[1] for words in typed] == ["benchmarks/reproduce"] * 2
    read = [arguments_of(words[2:]) for words in typed]
    assert {one.table for one in read} == {"vbench-w4a6"}
    assert read[0].dry_run


def test_every_family_has_a_page_with_each_of_its_models():
    assert {path.stem for path in PAGES[1:]} == set(page_names())
    for name, entry in published_models().items():
        page = (DOCS / "models" / f"{entry['page']}.md").read_text()
        assert f"\n## {entry['title']}\n" in page
        assert f"<!-- table: commands {name} -->" in page


def test_every_supported_transformer_is_on_the_page_of_a_family():
    assert {name for page in page_names() for name, _ in families_of(page)} == set(FAMILIES)


def test_a_family_page_has_the_storage_that_is_planned_and_its_pipelines():
    storage, time = (line for line in sizes_and_times_table("skyreels-v2").splitlines() if line.startswith("| SkyR"))
    assert "h (" in time
    assert storage.split(" | ")[1:3] == ["26.61 GiB", "6.87 GiB"]
    modes = modes_table("wan")
    assert "| `WanImageToVideoPipeline` | image to video | yes | diffusers, SDNQ, ComfyUI, GGUF |" in modes
    assert "| `WanAnimatePipeline` | image, pose video and face video to video |" in modes


def test_published_models_name_the_synthetic_ones():
    named = {entry["synthetic"] for entry in published_models().values()} - {None}
    assert named == set(synthetic_names())


def test_every_published_pipeline_has_a_tiny_one():
    assert {entry["pipeline"] for entry in published_models().values()} == set(PIPELINES)


@pytest.mark.parametrize("pipeline", quick(PIPELINES, "WanPipeline", "LTX2Pipeline", "WanAnimatePipeline"))
def test_the_python_of_the_page_runs(pipeline, tmp_path, monkeypatch):
    """On a tiny pipeline of the class: smaller videos, in float32, without a GPU to move parts to."""
    pipe = tiny_pipeline(PIPELINES[pipeline])
    s2q.quantize(pipe, recipe="rtn-w4a6", out=tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)
    name, entry = next((name, one) for name, one in published_models().items() if one["pipeline"] == pipeline)
    code = re.search(r"```python\n(.*)```", python_of(name), flags=re.DOTALL)
    assert code is not None
    small = {**video_size(pipe), "num_inference_steps": 2}
    if pipeline == "CogVideoXPipeline":
        small["max_sequence_length"] = 16
    given, sizes = dict(entry["call"]), dict(small)
    if pipeline == "WanAnimatePipeline":
        given["segment_frame_length"], sizes["segment_frame_length"] = given.pop("num_frames"), sizes.pop("num_frames")
        given = {"segment_frame_length": given.pop("segment_frame_length"), **given}
        frames = moving_square("red")
        frames[0].save("image.png")
        for name_of_video in ("pose_video", "face_video"):
            Path(f"{name_of_video}.mp4").write_bytes(encode_mp4(np.stack([np.array(frame) for frame in frames])))
    if pipeline == "SanaVideoPipeline":
        given = {"frames" if key == "num_frames" else key: value for key, value in given.items()}
        sizes["frames"], sizes["use_resolution_binning"] = sizes.pop("num_frames"), False
    call = "".join(f"    {key}={value},\n" for key, value in given.items())
    assert call in code.group(1)
    tiny = code.group(1).replace(call, "".join(f"    {key}={value},\n" for key, value in sizes.items()))
    tiny = tiny.replace(f'"{name}-w4a6"', '"checkpoint"').replace(f"torch.{entry['dtype']}", "torch.float32")
    tiny = tiny.replace("pipe.enable_model_cpu_offload()\n", "").replace("a cat walking over wet grass", "a cat")
    exec(compile(tiny, "real-models.md", "exec"), {})
    assert (tmp_path / "video.mp4").stat().st_size > 0


def test_a_peak_above_the_devices_memory_is_marked():
    stages = [SimpleNamespace(peak_memory_bytes=size) for size in (2 * 10**9, 3)]
    assert planned_peak(SimpleNamespace(stages=stages, device={"memory_bytes": 2 * 10**9})) == "2.0 GB"
    assert planned_peak(SimpleNamespace(stages=stages, device={"memory_bytes": 10**9})) == "does not fit: 2.0 GB"
