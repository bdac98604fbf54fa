"""Collecting: the pipeline goes to the device once, for the prompts that are not there yet."""

from dataclasses import replace

import pytest
import torch

from s2q.calibration.artefacts import call_inputs
from s2q.calibration.calibration_set import select
from s2q.calibration.candidates import branches_of, prepare, record_prompt, score_candidates
from s2q.calibration.teacher import load_teacher
from s2q.common.run_folder import open_run_folder
from s2q.engines.engine import InProcessEngine
from s2q.recipes.load import load_recipe
from s2q.run import work
from s2q.run.work import TEACHER, TeacherSource, record_prompts
from s2q.selection.selection import UNSCORED
from tiny import tiny_pipeline

STEPS = 2
PROMPTS = ["red", "blue", "green"]


@pytest.fixture
def collecting(tmp_path, monkeypatch):
    """Collect some prompts in one run folder; returns the pools, the stays on the device, and the progress."""
    recipe = load_recipe("s2q-w4a6", overrides=[f"calibration.steps={STEPS}", "calibration.samples=1"])
    teacher = load_teacher(tiny_pipeline("cogvideox"), recipe, dtype=None)
    stays, original = [], work.pipeline_on_device

    def counted(pipe, device, **options):
        stays.append((pipe, device))
        return original(pipe, device, **options)

    monkeypatch.setattr(work, "pipeline_on_device", counted)
    with open_run_folder(tmp_path / "out") as folder:

        def collected(prompts):
            stays.clear()
            seen = []
            inputs = prepare(teacher, prompts, recipe.calibration, seed=0, inputs={})
            engine = InProcessEngine("cpu")
            engine.offer(TEACHER, teacher)
            source = TeacherSource(source=None, recipe=recipe, dtype=None, linears=teacher.linears)
            record_prompts(engine, source, inputs, folder, progress=lambda *step: seen.append(step))
            return (
                score_candidates(teacher, inputs, folder),
                list(stays),
                seen,
            )

        yield collected


def test_all_prompts_are_generated_in_one_stay_on_the_device(collecting):
    pools, stays, seen = collecting(PROMPTS)
    assert len(stays) == 1
    total = len(PROMPTS) * STEPS
    assert seen == [("collect", done, total) for done in range(total + 1)]
    candidates = pools["transformer"].candidates
    assert [(candidate.prompt, candidate.step) for candidate in candidates] == [
        (p, s) for p in range(len(PROMPTS)) for s in range(STEPS)
    ]


def test_only_what_is_missing_is_generated(collecting):
    first, *_ = collecting(PROMPTS[:2])
    pools, stays, seen = collecting(PROMPTS)
    assert len(stays) == 1
    assert seen == [("collect", done, 6) for done in (4, 5, 6)]
    assert pools["transformer"].candidates[:4] == first["transformer"].candidates
    again, stays, seen = collecting(PROMPTS)
    assert (stays, seen) == ([], [("collect", 6, 6)])
    assert again["transformer"].candidates == pools["transformer"].candidates


@pytest.mark.parametrize("selection", sorted(UNSCORED))
def test_a_selection_without_scores_is_known_before_and_generates_no_further(selection, tmp_path):
    options = ["calibration.steps=4", "calibration.samples=3", f"calibration.selection={selection}"]
    recipe = load_recipe("s2q-w4a6", overrides=options)
    teacher = load_teacher(tiny_pipeline("cogvideox"), recipe, dtype=None)
    group, results = recipe.calibration, {}
    for name in ("partial", "whole"):
        inputs = prepare(teacher, PROMPTS, group, seed=3, inputs={})
        if name == "whole":
            inputs = replace(inputs, steps=(4, 4, 4), chosen=None)
        with open_run_folder(tmp_path / name) as folder:
            for prompt in inputs.recorded:
                record_prompt(teacher, inputs, folder, prompt, step_done=lambda: None)
            pools = score_candidates(teacher, inputs, folder)
            branches = branches_of(folder, inputs)
            sets = select(pools, inputs, group, branches=branches)
            samples = sets.samples["transformer"]
            calls = [call_inputs(folder.load(inputs.key(call.prompt)), call) for call in samples.calls]
            results[name] = inputs.steps, samples, calls
    (steps, samples, calls), (_, expected, of_expected) = results["partial"], results["whole"]
    assert samples.calls == expected.calls
    for call, whole in zip(calls, of_expected, strict=True):
        assert all(torch.equal(call[key], whole[key]) for key in call if torch.is_tensor(call[key]))
    assert max(steps) == 4
    assert sum(steps) < 12 or selection == "rtfp"
    assert [call.step for call in samples.timesteps] == [0, 1, 2, 3]
    assert all(steps[call.prompt] > call.step for call in samples.timesteps)
    assert sum(candidate["selected"] for candidate in samples.record["candidates"]) == 3
    assert len(samples.record["candidates"]) == sum(steps)
    assert samples.record["guidance_branches"] == branches
