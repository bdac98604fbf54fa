"""A model is calibrated the way it is run, and its checkpoint is generated and judged that way by default."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import save_file

from s2q.calibration.candidates import prepare
from s2q.calibration.teacher import load_teacher
from s2q.checkpoint import load_pipeline
from s2q.common.errors import InvalidInputError
from s2q.common.log import log_once
from s2q.comparison.compare import compare
from s2q.evaluation.evaluate import evaluate
from s2q.generation.defaults import calibrated_generation, generation_defaults
from s2q.models import resolve_model
from s2q.planning import plan
from s2q.recipes.load import load_recipe
from s2q.run.quantize import quantize
from tiny import tiny_pipeline, video_size

RECIPE = "rtn-w4a6"
AS_RUN = {"num_inference_steps": 3, "guidance_scale": 1.0, "scheduler": "FlowMatchEulerDiscreteScheduler", "shift": 8.0}
OPTIONS = [
    "steps=3",
    "guidance_scale=1",
    "scheduler=FlowMatchEulerDiscreteScheduler",
    "shift=8",
    "samples=3",
    "selection=coverage",
]
CALIBRATES = "transforms.scale=smooth"
SIZES = [f"{name}={size}" for name, size in video_size(tiny_pipeline("wan")).items()]


def overrides(*options):
    return [CALIBRATES, *(f"calibration.{option}" for option in (*options, *SIZES))]


@pytest.fixture(autouse=True)
def fresh_log():
    """Warn as a new process does."""
    log_once.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline("wan").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(folder, tmp_path_factory):
    """Calibrated in few steps without guidance, on both branches of those that there are."""
    out = tmp_path_factory.mktemp("checkpoint") / "out"
    options = overrides(*OPTIONS, "branches=both")
    return out, quantize(folder, recipe=RECIPE, out=out, prompts=["red", "blue"], overrides=options)


def test_samples_are_of_the_one_branch_and_the_settings_are_recorded(checkpoint):
    out, report = checkpoint
    assert [call.rpartition("/")[2] for call in report.selection["calls"]] == ["0"] * 3
    assert AS_RUN.items() <= report.selection["settings"].items()
    assert report.generation == AS_RUN
    assert json.loads((out / "s2q/report.json").read_text())["generation"] == AS_RUN
    recipe = json.loads((out / "s2q/recipe.json").read_text())["calibration"]
    assert (recipe["steps"], recipe["guidance_scale"], recipe["shift"]) == (3, 1.0, 8.0)
    assert "num_inference_steps=3, guidance_scale=1.0" in (out / "README.md").read_text()


def test_the_checkpoint_keeps_the_scheduler_of_the_model(checkpoint, folder):
    assert load_pipeline(checkpoint[0]).scheduler.config.flow_shift == tiny_pipeline("wan").scheduler.config.flow_shift


def test_the_checkpoint_is_judged_so_and_the_user_may_choose_otherwise(checkpoint, folder):
    out, _ = checkpoint
    assert generation_defaults(out) == AS_RUN
    size = video_size(load_pipeline(out))
    judged = evaluate(out, reference=folder, prompts=["red"], seeds=[0], metrics=["velocity"], workers=1, **size)
    assert AS_RUN.items() <= judged["settings"].items()
    planned = compare([str(out)], model=folder, out=out.parent / "c", prompts=["red"], dry_run=True, **size)
    assert AS_RUN.items() <= planned["settings"].items()
    planned = compare([str(out)], model=folder, out=out.parent / "c", prompts=["red"], dry_run=True, **size, shift=2)
    assert planned["settings"]["shift"] == 2.0


def test_entries_that_were_calibrated_differently_are_judged_as_the_model_is(checkpoint, folder, caplog):
    out, _ = checkpoint
    prompts, size = ["red"] * 1, video_size(load_pipeline(out))
    common = {"model": folder, "out": out.parent / "c", "prompts": prompts, "dry_run": True, **size}
    with caplog.at_level(logging.WARNING):
        planned = compare([str(out), "smoothquant-w4a6"], calibration_prompts=["red", "blue"], **common)
    assert planned["settings"]["num_inference_steps"] == 50
    (warning,) = [text for text in caplog.messages if "calibrated with other generation settings" in text]
    expected = "guidance_scale the model's against 1.0, num_inference_steps the model's against 3, scheduler"
    assert f" ({expected}" in warning
    assert not any(name in warning for name in ("max_sequence_length", "negative_prompt"))
    planned = compare([str(out), "rtn-w4a6"], **common)
    assert planned["settings"]["num_inference_steps"] == 3


@pytest.mark.parametrize("option", ["guidance_scale=1", "shift=8", "negative_prompt=ugly", "max_sequence_length=64"])
def test_recorded_calls_depend_on_every_setting(folder, option):
    fingerprints = []
    for options in ((), (option,)):
        recipe = load_recipe(RECIPE, overrides=overrides("steps=3", "samples=1", *options))
        teacher = load_teacher(tiny_pipeline("wan"), recipe, dtype=None)
        inputs = prepare(teacher, ["red"], recipe.calibration, seed=0, inputs={})
        fingerprints.append(inputs.prompt_fingerprint(0))
    assert fingerprints[0] != fingerprints[1]


def test_bad_settings_are_refused_before_weights_are_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("s2q.run.stages.load_teacher", None)
    for option, message in (("scheduler=DDIMScheduler", "does not fit WanPipeline"), ("num_frames=10", "use 9 or 13")):
        options = [CALIBRATES, f"calibration.{option}"]
        with pytest.raises(InvalidInputError, match=message):
            quantize(folder, recipe=RECIPE, out=tmp_path / "out", prompts=["red"], overrides=options)
    assert not list(tmp_path.iterdir())


def test_recipes_without_calibration_check_their_settings_and_ignore_them_with_a_warning(folder, caplog):
    options = {"recipe": RECIPE, "overrides": ["calibration.steps=4", *(f"calibration.{option}" for option in SIZES)]}
    text = (
        "calibration.num_frames, calibration.height, calibration.width: recipe rtn-w4a6 needs no calibration, ignored"
    )
    for work in (
        lambda: plan(folder, **options),
        lambda: quantize(folder, **options, dry_run=True),
        lambda: quantize(tiny_pipeline("wan"), **options, dry_run=True),
    ):
        log_once.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            work()
        assert caplog.text.count(text) == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        plan("synthetic:wan-1.3b", recipe=RECIPE, overrides=["calibration.guidance_scale=1"])
    assert "calibration.guidance_scale: recipe rtn-w4a6 needs no calibration" in caplog.text


@pytest.mark.parametrize("recipe", [RECIPE, "s2q-w4a6"])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("scheduler=Nonsense", "unknown scheduler 'Nonsense'"),
        ("steps=2000", r"^calibration\.steps: got 2000; the scheduler has 1000 timesteps"),
        ("height=20", r"^calibration\.height: got 20; VAE and transformer take"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_the_keys_of_the_recipe(folder, recipe, option, message):
    for model in (folder, tiny_pipeline("wan")):
        with pytest.raises(InvalidInputError, match=message):
            quantize(model, recipe=recipe, overrides=[f"calibration.{option}"], prompts=["red"], dry_run=True)


def test_a_distilled_model_is_a_warning_once_and_also_if_its_pipeline_needs_weights(folder, caplog, monkeypatch):
    recipe = load_recipe(RECIPE, overrides=overrides("steps=3"))
    distilled = folder.with_name("tiny-lightning")
    shutil.copytree(folder, distilled)
    source = resolve_model(distilled)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            plan(source, recipe=recipe)
            load_teacher(source, recipe, dtype=None)
    assert caplog.text.count("tiny-lightning looks step-distilled") == 1
    caplog.clear()
    log_once.cache_clear()
    monkeypatch.setattr(type(source), "meta_pipeline", lambda *_: None)
    with caplog.at_level(logging.WARNING):
        plan(source, recipe=recipe)
        load_teacher(source, recipe, dtype=None)
    assert caplog.text.count("tiny-lightning looks step-distilled") == 1


def test_calibration_prompts_are_checked_against_the_settings_of_calibration(folder, tmp_path):
    size = video_size(tiny_pipeline("wan"))
    common = {"model": folder, "out": tmp_path / "c", "prompts": ["red"], "dry_run": True, **size}
    common |= {"calibration_prompts": ["red " * 8], "overrides": [f"calibration.{option}" for option in SIZES]}
    compare(["smoothquant-w4a6"], **common, max_sequence_length=8)
    common["overrides"].append("calibration.max_sequence_length=8")
    with pytest.raises(InvalidInputError, match=r"prompt 1 of 1 has \d+ tokens, but the transformer reads 8"):
        compare(["smoothquant-w4a6"], **common, max_sequence_length=64)


@pytest.mark.parametrize(
    ("lora", "warns"),
    [
        ("wan-lightning.safetensors", True),
        ("style.safetensors", False),
        ("distilled/style.safetensors", False),
        ("lcm/pytorch_lora_weights.safetensors", True),
    ],
)
def test_a_lora_that_looks_distilled_is_a_warning_where_guidance_is_on(folder, tmp_path, caplog, lora, warns):
    (tmp_path / lora).parent.mkdir(exist_ok=True)
    linear = "transformer.blocks.0.attn1.to_q"
    factors = {f"{linear}.lora_A.weight": torch.zeros(1, 64), f"{linear}.lora_B.weight": torch.zeros(64, 1)}
    save_file(factors, tmp_path / lora)
    with caplog.at_level(logging.WARNING):
        quantize(folder, recipe=RECIPE, overrides=overrides(), prompts=["red"], loras=[tmp_path / lora], dry_run=True)
    assert ("looks step-distilled" in caplog.text) is warns
    assert caplog.text.count("step-distilled") <= 1


def test_a_report_with_other_settings_is_refused(tmp_path):
    (tmp_path / "s2q").mkdir()
    for generation in ({"stepz": 3}, [], "x"):
        (tmp_path / "s2q/report.json").write_text(json.dumps({"selection": {}, "generation": generation}))
        with pytest.raises(InvalidInputError, match=r"report\.json: generation has .*; expected generation settings"):
            calibrated_generation(tmp_path)
    (tmp_path / "s2q/report.json").write_text(json.dumps({"selection": None}))
    assert calibrated_generation(tmp_path) is None
