import json
import re
import shutil

import pytest
import safetensors.torch
import torch

from quick import slow
from s2q.common.errors import InvalidInputError, S2QError, UsageError
from s2q.comparison import compare as comparing_run
from s2q.comparison import shards as comparing_shards
from s2q.comparison.compare import compare
from s2q.models import ModelSource
from s2q.run.quantize import quantize
from tiny_judges import save_tiny_clip, save_tiny_lpips

pytestmark = pytest.mark.usefixtures("no_encoding", "forked_workers")

SETTINGS = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 16, "width": 16, "num_frames": 9}
PROMPTS = tuple(f"scene {number}" for number in range(10))
RECIPES = ("rtn-w4a4", "rtn-w8a8")


def run(model, out, *, entries=RECIPES, prompts=PROMPTS, progress=None, **options):
    return compare(
        entries, model=model, out=out, prompts=prompts, progress=progress, **{**SETTINGS, "seeds": [0], **options}
    )


def untimed(result):
    result = json.loads(json.dumps(result))
    for entry in result["entries"]:
        entry["seconds"] = None
    return result


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory):
    """A comparison that was not interrupted, and its folder."""
    out = tmp_path_factory.mktemp("whole") / "comparison"
    return run(tiny_model, out), out


def test_a_comparison_writes_its_files_and_results(whole, tiny_model):
    result, out = whole
    assert json.loads((out / "compare.json").read_text()) == result
    assert {path.name for path in out.iterdir()} == {
        *("checkpoints", "evaluations", "frames", "videos"),
        *("compare.json", "compare.md", "compare_run.json", "index.html", "sheet.png"),
    }
    assert [entry["label"] for entry in result["entries"]] == list(RECIPES)
    for entry in result["entries"]:
        assert entry["error"] is None
        assert entry["seconds"] > 0
        assert entry["storage"]["ratio"] > 1
        assert entry["metrics"]["velocity_relative_error"]["low"] is not None
        evaluation = json.loads((out / "evaluations" / entry["label"] / "eval.json").read_text())
        assert [video["prompt"] for video in evaluation["videos"]] == list(PROMPTS)
        assert evaluation["metrics"] == entry["metrics"]
        assert len(list((out / "frames" / entry["label"]).iterdir())) == 4
    assert [group["width"] for group in result["groups"]] == ["w8a8", "w4a4"]
    assert [group["ranking"] for group in result["groups"]] == [["rtn-w8a8"], ["rtn-w4a4"]]
    assert result["warning"] is None
    assert [path.name for path in out.parent.iterdir()] == ["comparison"], "no lock is left"


def test_shards_give_what_one_evaluation_gives(whole, tiny_model):
    from s2q.evaluation.evaluate import evaluate

    result, out = whole
    alone = evaluate(
        out / "checkpoints" / "rtn-w4a4",
        reference=tiny_model,
        prompts=PROMPTS,
        seeds=(0,),
        **SETTINGS,
    )
    ours = json.loads((out / "evaluations" / "rtn-w4a4" / "eval.json").read_text())
    assert set(ours) == set(alone)
    assert ours["velocity"]["n_videos"] == alone["velocity"]["n_videos"] == 10
    measured = {name: entry for name, entry in alone["metrics"].items() if entry["mean"] is not None}
    assert len(measured) >= 6
    for name, entry in measured.items():
        assert ours["metrics"][name]["mean"] == pytest.approx(entry["mean"], rel=1e-3), name


@pytest.mark.slow
def test_a_killed_run_goes_on_and_gives_the_same(whole, tiny_model, tmp_path):
    class KilledError(BaseException):
        pass

    def kill_at(wanted):
        def killer(stage, done, total):
            if stage == wanted and done >= 0.6 * total:
                raise KilledError

        return killer

    out = tmp_path / "comparison"
    with pytest.raises(KilledError):
        run(tiny_model, out, progress=kill_at("quantize"))
    assert [path.name for path in (out / "checkpoints").glob("rtn*")] == ["rtn-w4a4"]
    with pytest.raises(KilledError):
        run(tiny_model, out, progress=kill_at("evaluate"))
    finished = {path: path.stat().st_mtime_ns for path in out.glob("evaluations/*/shard-*.json")}
    assert 0 < len(finished) < 4
    assert not (out / "compare.json").exists()
    assert untimed(run(tiny_model, out)) == untimed(whole[0])
    assert all(path.stat().st_mtime_ns == before for path, before in finished.items()), "nothing is done twice"
    stages = set()
    again = run(tiny_model, out, progress=lambda stage, done, total: stages.add(stage))
    assert again == json.loads((out / "compare.json").read_text())
    assert stages == {"write"}


def test_two_processes_give_the_same(whole, tiny_model, tmp_path):
    calls = []
    result = run(tiny_model, tmp_path / "two", workers=2, progress=lambda *call: calls.append(call))
    assert untimed(result) == untimed(whole[0])
    steps = [(done, total) for stage, done, total in calls if stage == "evaluate"]
    assert steps[0][0] == 0
    assert steps[-1] == (20, 20), "2 shards · 2 steps · (1 + 2 · 2 entries)"
    assert steps == sorted(steps)


def test_entries_may_join_and_leave(whole, tiny_model, tmp_path):
    out = tmp_path / "comparison"
    few = {"prompts": PROMPTS[:2]}
    run(tiny_model, out, entries=["rtn-w4a4"], **few)
    shard = out / "evaluations/rtn-w4a4/shard-000.json"
    before = shard.stat().st_mtime_ns
    both = run(tiny_model, out, entries=["rtn-w4a4", "rtn-w4a6"], **few)
    assert both["groups"][0]["width"] == "w4a6"
    assert len(both["entries"]) == 2
    alone = run(tiny_model, out, entries=["rtn-w4a6"], **few)
    assert [entry["label"] for entry in alone["entries"]] == ["rtn-w4a6"]
    run(tiny_model, out, entries=["rtn-w4a4"], **few)
    assert shard.stat().st_mtime_ns == before


def test_a_checkpoint_may_change_and_move(tiny_model, tmp_path):
    few = {"prompts": PROMPTS[:2], "metrics": ("psnr",)}
    made, moved = tmp_path / "a" / "made", tmp_path / "b" / "made"
    quantize(tiny_model, recipe="rtn-w4a4", out=made)
    first = run(tiny_model, tmp_path / "out", entries=[str(made)], **few)
    shutil.move(made.parent, moved.parent)
    shard = tmp_path / "out/evaluations/made/shard-000.json"
    before = shard.stat().st_mtime_ns
    again = run(tiny_model, tmp_path / "out", entries=[str(moved)], **few)
    assert again["entries"][0]["metrics"] == first["entries"][0]["metrics"]
    assert shard.stat().st_mtime_ns == before, "it is the same checkpoint"
    quantize(tiny_model, recipe="rtn-w8a8", out=moved, overwrite=True)
    better = run(tiny_model, tmp_path / "out", entries=[str(moved)], **few)
    ours, theirs = (one["entries"][0]["metrics"]["psnr_frame_mean_db"]["mean"] for one in (better, first))
    assert ours > theirs


def test_a_dry_run_and_a_finished_one_load_no_model(whole, tiny_model, monkeypatch):
    monkeypatch.setattr(ModelSource, "load_pipeline", None)
    monkeypatch.setattr(comparing_shards, "run_reference", None)
    run(tiny_model, whole[1], dry_run=True)
    assert untimed(run(tiny_model, whole[1])) == untimed(whole[0])


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        slow(lambda data: b""),
        slow(lambda data: data[:200] + b"\0" * 60 + data[260:]),
    ],
)
def test_frames_that_cannot_be_decoded_are_generated_again(whole, tiny_model, tmp_path, monkeypatch, damage):
    result, finished = whole
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    path = out / "frames/rtn-w4a4/001.npz"
    expected = path.read_bytes()
    path.write_bytes(damage(expected))
    evaluated, judge_model = [], comparing_shards.judge_model
    judged = lambda model, *args, **options: evaluated.append(str(model)) or judge_model(model, *args, **options)  # noqa: E731
    monkeypatch.setattr(comparing_shards, "judge_model", judged)
    assert untimed(run(tiny_model, out, workers=1)) == untimed(result)
    assert path.read_bytes() == expected
    assert len(evaluated) == 1
    assert "rtn-w4a4" in evaluated[0]


def test_a_comparison_of_another_version_is_named(whole, tiny_model, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole[1], out)
    record = json.loads((out / "compare_run.json").read_text())
    (out / "compare_run.json").write_text(json.dumps(record | {"schema_version": 9}))
    message = r"contains a different comparison: compare_run.json has schema_version=9; this s2q reads 1"
    with pytest.raises(InvalidInputError, match=message):
        run(tiny_model, out)


def test_a_comparison_is_not_replaced_by_one_of_its_own_parts(whole, tiny_model, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole[1], out)
    part = str(out / "checkpoints" / "rtn-w4a4")
    for changed in ({"prompts": PROMPTS[:9]}, {"resume": False}):
        with pytest.raises(InvalidInputError, match="is part of the comparison in .*, which --overwrite would remove"):
            run(tiny_model, out, entries=[part, "rtn-w8a8"], overwrite=True, **changed)
    assert (out / "compare.json").is_file()


def test_a_checkpoint_and_the_recipe_that_made_it_are_equal(whole, tiny_model, tmp_path):
    made = str(whole[1] / "checkpoints" / "rtn-w4a4")
    copy = tmp_path / "same.yaml"
    copy.write_text("extends: rtn-w4a4\nname: same\n")
    result = run(tiny_model, tmp_path / "out", entries=[made, str(copy)])
    first, second = result["entries"]
    assert (first["checkpoint"], second["recipe"]) == (made, "same")
    assert first["metrics"] == second["metrics"]
    assert first["storage"] == second["storage"]
    assert all(verdict["winner"] is None for verdict in result["groups"][0]["winners"].values())
    assert "all are tied" in (tmp_path / "out" / "compare.md").read_text()


def test_one_that_cannot_take_the_model_is_reported(tiny_model, tmp_path):
    recipe = tmp_path / "groups.yaml"
    recipe.write_text(
        "extends: rtn-w4a4\nname: groups\nweights: {num_bits: 4, granularity: per_group, group_size: 48}\n"
    )
    result = run(tiny_model, tmp_path / "out", entries=["rtn-w4a4", str(recipe)], prompts=PROMPTS[:2])
    good, bad = result["entries"]
    assert good["error"] is None
    assert "not divisible by group_size=48" in bad["error"]
    assert result["groups"][0]["ranking"] == ["rtn-w4a4"]
    assert "too few" in result["warning"]
    for name in ("compare.md", "index.html"):
        text = (tmp_path / "out" / name).read_text()
        assert "not divisible by group_size=48" in text
        assert "too few prompts for statistics" in text.lower()
    with pytest.raises(InvalidInputError, match="nothing can be compared"):
        run(tiny_model, tmp_path / "none", entries=[str(recipe)])
    assert not (tmp_path / "none").exists()


def test_one_that_fails_on_the_way_is_reported_and_tried_again(tiny_model, tmp_path, monkeypatch):
    def judge(model, teacher, **options):
        if model.endswith("rtn-w4a4"):
            raise S2QError("not finite")
        return real(model, teacher, **options)

    def broken(*arguments, **options):
        if not options.get("dry_run") and options["recipe"].name == "rtn-w4a6":
            raise S2QError("diverged")
        return quantized(*arguments, **options)

    real, quantized = comparing_shards.judge_model, comparing_run.quantize
    out, entries = tmp_path / "out", [*RECIPES, "rtn-w4a6"]
    with monkeypatch.context() as patched:
        patched.setattr(comparing_shards, "judge_model", judge)
        patched.setattr(comparing_run, "quantize", broken)
        result = run(tiny_model, out, entries=entries, prompts=PROMPTS[:2])
    assert [entry["error"] for entry in result["entries"]] == ["not finite", None, "diverged"]
    assert [group["ranking"] for group in result["groups"]] == [["rtn-w8a8"]]
    result = run(tiny_model, out, entries=entries, prompts=PROMPTS[:2])
    assert [entry["error"] for entry in result["entries"]] == [None] * 3


@pytest.mark.slow
def test_learned_judges_take_part(tiny_model, tmp_path):
    prompts = PROMPTS[:9]  # a shard and a part of one
    judges = {"lpips_weights": save_tiny_lpips(tmp_path / "lpips.pth"), "clip": save_tiny_clip(tmp_path / "clip")}
    wanted = {"entries": ["rtn-w4a4"], "prompts": prompts, "metrics": ("ssim", "lpips", "clip_score")}
    wanted |= {"height": 32, "width": 32}  # smaller ones have nothing left after LPIPS's layers
    result = run(tiny_model, tmp_path / "out", workers=2, **wanted, **judges)
    metrics = result["entries"][0]["metrics"]
    assert set(metrics) == {"ssim", "lpips", "clip_score", "reference_clip_score"}
    assert metrics["lpips"]["mean"] > 0
    assert "| LPIPS | CLIP score |" in (tmp_path / "out" / "compare.md").read_text()
    with pytest.raises(InvalidInputError, match="metric lpips: needs --lpips-weights"):
        run(tiny_model, tmp_path / "out", **wanted)
    tensors = torch.load(judges["lpips_weights"])
    torch.save({name: tensor + 1 for name, tensor in tensors.items()}, judges["lpips_weights"])
    with pytest.raises(InvalidInputError, match="contains a different comparison: judges: lpips.weights "):
        run(tiny_model, tmp_path / "out", **wanted, **judges)
    with pytest.raises(InvalidInputError, match="no such weight file"):
        run(tiny_model, tmp_path / "out", lpips_weights=tmp_path / "none.pth")


def test_a_reference_that_fails_in_a_process_is_the_error_of_the_comparison(whole, tiny_model, tmp_path):
    damaged = tmp_path / "model"
    shutil.copytree(tiny_model, damaged)
    weights = damaged / "transformer" / "diffusion_pytorch_model.safetensors"
    state = safetensors.torch.load_file(weights)
    safetensors.torch.save_file(
        {name: torch.full_like(tensor, float("nan")) for name, tensor in state.items()}, weights
    )
    checkpoints = [str(whole[1] / "checkpoints" / name) for name in RECIPES]
    with pytest.raises(S2QError, match="NaN or infinite latents"):
        run(damaged, tmp_path / "out", entries=checkpoints, prompts=PROMPTS[:1], workers=2)


def test_nothing_is_overwritten(whole, tiny_model, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("keep")
    for overwrite in (False, True):
        with pytest.raises(InvalidInputError, match="was not written by this command"):
            run(tiny_model, other, overwrite=overwrite)
    assert [path.name for path in other.iterdir()] == ["mine.txt"]
    _, out = whole
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    changes = {
        "prompts differ (10 → 9)": {"prompts": PROMPTS[:9]},
        "prompts differ (number 1: 'scene 0' → 'else')": {"prompts": ("else", *PROMPTS[1:])},
        "settings: num_inference_steps 2 → 3": {"num_inference_steps": 3},
        "seed 0 → 1": {"seed": 1},
        "entry rtn-w4a4: recipe.skip differ": {"overrides": ("skip=[transformer_blocks.0.*]",)},
        "contains a comparison; pass --overwrite": {"resume": False},
    }
    for message, changed in changes.items():
        with pytest.raises(InvalidInputError, match=re.escape(message)):
            run(tiny_model, out, **changed)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_comparison_that_was_killed_in_its_first_file_starts_again(tiny_model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".compare_run.json.abc.partial").write_text("{")
    assert run(tiny_model, out, entries=["rtn-w4a4"], prompts=PROMPTS[:1])["prompts"] == ["scene 0"]
    assert list(out.rglob(".*")) == []


def test_the_run_folder_of_a_finished_checkpoint_that_a_killed_comparison_left_is_removed(tiny_model, tmp_path):
    out = tmp_path / "out"
    run(tiny_model, out, entries=["rtn-w4a4"], prompts=PROMPTS[:1])
    abandoned = out / "checkpoints" / ".rtn-w4a4.s2q-run"
    abandoned.mkdir()
    for name in ("lock", "events.jsonl", "transformer-0.json"):
        (abandoned / name).write_text("")
    run(tiny_model, out, entries=["rtn-w4a4"], prompts=PROMPTS[:1])
    assert list(out.rglob(".*")) == []


def test_overwriting_replaces_a_comparison_and_nothing_else(tiny_model, tmp_path):
    out = tmp_path / "out"
    run(tiny_model, out, entries=["rtn-w4a4"], prompts=PROMPTS[:1])
    (out / "notes.txt").write_text("mine")
    result = run(tiny_model, out, entries=["rtn-w8a8"], prompts=PROMPTS[1:2], overwrite=True)
    assert result["prompts"] == ["scene 1"]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["rtn-w8a8"]
    assert (out / "notes.txt").read_text() == "mine"
    for file in ("checkpoints/rtn-w8a8/lora.safetensors", "videos/notes.txt", "evaluations/rtn-w8a8/notes.txt"):
        (out / file).parent.mkdir(exist_ok=True)
        (out / file).write_text("mine")
        with pytest.raises(InvalidInputError, match="did not write"):
            run(tiny_model, out, entries=["rtn-w4a4"], prompts=PROMPTS[:1], overwrite=True)
        assert (out / file).read_text() == "mine"
        (out / file).unlink()


def test_bad_input_is_refused_before_any_compute(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(comparing_run, "output_lock", None)
    cases = [
        (UsageError, "got nothing to compare", {"entries": []}),
        (InvalidInputError, "workers: got 0; expected at least 1", {"workers": 0}),
        (InvalidInputError, "nearest names are psnr", {"metrics": ("psrn",)}),
        (
            InvalidInputError,
            "prompt 2 of 2 has 1[0-9][0-9] tokens, but the transformer reads 96",
            {"prompts": ("a", "b" * 120)},
        ),
        (InvalidInputError, "'a' appears twice", {"prompts": ("a", "a")}),
        (InvalidInputError, "height: got 17", {"height": 17}),
        (InvalidInputError, "s2q-w4a6 need calibration prompts", {"entries": ["rtn-w4a6", "s2q-w4a6"]}),
        (UsageError, "no recipe or peer calibrates", {"calibration_prompts": ("a",)}),
        (
            InvalidInputError,
            "prompt 1 of 1 has 1[0-9][0-9] tokens",
            {"entries": ["s2q-w4a6"], "calibration_prompts": ("b" * 120,)},
        ),
    ]
    for error, message, changed in cases:
        with pytest.raises(error, match=message):
            run(tiny_model, tmp_path / "out", **changed)
    with pytest.raises(InvalidInputError, match="already quantized"):
        run(_quantized(tiny_model, tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _quantized(model, folder):
    from s2q.run.quantize import quantize

    quantize(model, recipe="rtn-w4a6", out=folder / "quantized")
    return folder / "quantized"


def test_a_dry_run_computes_nothing(tiny_model, tmp_path):
    plan = run(tiny_model, tmp_path / "out", dry_run=True)
    assert plan["n_videos"] == 30
    assert [entry["width"] for entry in plan["entries"]] == ["w4a4", "w8a8"]
    assert plan["entries"][0]["storage"]["ratio"] > 1
    assert not (tmp_path / "out").exists()
