"""The time of a run, from a slice of it."""

import itertools

import pytest

from quick import quick
from s2q.calibration.teacher import load_teacher
from s2q.common.errors import InvalidInputError
from s2q.generation.settings import resolve_settings
from s2q.models import resolve_model
from s2q.planning import plan_model, this_machine
from s2q.planning.cost import block_shapes
from s2q.planning.flop import forward_work
from s2q.recipes.load import load_recipe
from s2q.run import quantize, stages
from s2q.run import time_estimate as measure
from s2q.run.time_estimate import BlockSeconds, measured
from tiny import tiny_pipeline, video_size


def test_the_parts_are_found_from_the_total_times_of_short_runs():
    parts = BlockSeconds(fixed=3.0, once=0.25, step=0.5, evaluation=0.125)
    cases = [(2, 1), (2, 5), (2, 10), (4, 1)]
    found = measure._parts({case: parts.total(*case) for case in cases}, distils=True)
    assert found.total(40, 15) == pytest.approx(parts.total(40, 15))
    assert parts.total(40, 15) == 3 + 40 * (0.25 + 15 * 0.5 + 5 * 0.125)
    plain = BlockSeconds(fixed=3.0, once=0.25)
    found = measure._parts({case: plain.total(*case) for case in [(2, 0), (4, 0)]}, distils=False)
    assert found == plain


def test_noise_makes_no_part_negative():
    found = measure._parts({(2, 1): 3.0, (2, 5): 2.0, (2, 10): 2.5, (4, 1): 2.9}, distils=True)
    assert min(found.fixed, found.once, found.step, found.evaluation) >= 0


@pytest.mark.parametrize("recipe", ["s2q-w4a6", "rtn-w4a6", "vidit-q-mp-w4a6"])
def test_every_stage_gets_its_seconds_and_nothing_is_left(tmp_path, recipe):
    tiny_pipeline("cogvideox").save_pretrained(tmp_path / "model")
    overrides = ["calibration.steps=4", "calibration.n_prompts=2", "calibration.samples=8"]
    validated, source = load_recipe(recipe, overrides=overrides), resolve_model(tmp_path / "model")
    machine = this_machine("cpu")
    planned = plan_model(source, validated, machine=machine)
    seen = []
    result = measured(planned, source, validated, machine=machine, progress=lambda *step: seen.append(step))
    seconds = {stage.name: stage.seconds for stage in result.stages}
    assert seconds.pop("assemble") is None  # not measured
    expected = {"collect", "select", "blocks"} if validated.calibrates else {"blocks"}
    assert seconds.keys() == expected | ({"allocate"} if validated.allocation else set())
    assert all(one > 0 for one in seconds.values())
    assert [stage.peak_memory_bytes for stage in result.stages] == [stage.peak_memory_bytes for stage in planned.stages]
    assert seen[-1][0] == "blocks"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(("prompts", "count"), [(None, 3), (["red", "blue"], 2), (["red"] * 9, 3)])
def test_collecting_takes_as_long_as_the_prompts_of_the_run(tmp_path, monkeypatch, prompts, count):
    tiny_pipeline("cogvideox").save_pretrained(tmp_path / "model")
    overrides = ["calibration.steps=4", "calibration.n_prompts=3", "calibration.samples=8"]
    recipe, source = load_recipe("s2q-w4a6", overrides=overrides), resolve_model(tmp_path / "model")
    machine = this_machine("cpu")
    planned = plan_model(source, recipe, machine=machine)
    clock = itertools.count()
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(measure, "_blocks", lambda *args, **arguments: 0.0)
    result = measured(planned, source, recipe, machine=machine, prompts=prompts)
    assert result.stages[0].seconds == count  # a video takes a second by this clock


@pytest.mark.slow
def test_both_of_two_transformers_get_samples(tmp_path):
    """Of few steps the second one takes none, so that more have to be measured."""
    tiny_pipeline("wan 2.2 a14b", boundary_ratio=0.7).save_pretrained(tmp_path / "model")
    size = [f"calibration.{name}={value}" for name, value in (("num_frames", 9), ("height", 16), ("width", 16))]
    overrides = ["calibration.steps=4", "calibration.n_prompts=2", "calibration.samples=2", *size]
    validated, source = load_recipe("s2q-w4a6", overrides=overrides), resolve_model(tmp_path / "model")
    machine = this_machine("cpu")
    result = measured(plan_model(source, validated, machine=machine), source, validated, machine=machine)
    assert [stage.seconds is None for stage in result.stages] == [False, False, False, True]


@pytest.mark.parametrize("selection", quick(["sds", "rtfp"], "sds"))
@pytest.mark.parametrize("trajectory", quick(["full_precision", "quantized"], "quantized"))
def test_the_plan_the_measurement_and_the_run_count_the_same_steps(tmp_path, monkeypatch, selection, trajectory):
    """The first transformer does not take half of the eight steps."""
    pipe = tiny_pipeline("wan 2.2 a14b", boundary_ratio=0.85)
    pipe.save_pretrained(tmp_path / "model")
    size = [f"calibration.{name}={value}" for name, value in (*video_size(pipe).items(), ("max_sequence_length", 16))]
    overrides = ["calibration.steps=8", "calibration.n_prompts=3", "calibration.samples=2", *size]
    overrides += [f"calibration.selection={selection}", f"calibration.trajectory_2={trajectory}"]
    recipe, source = load_recipe("quarot-w4a4", overrides=overrides), resolve_model(tmp_path / "model")
    teacher = load_teacher(source, recipe, dtype=None)
    assert (first := teacher.workload.called["transformer"]) != 4
    assert teacher.workload.called == {"transformer": first, "transformer_2": 8 - first}

    collected, original = [], stages.record_prompts

    def record_prompts(engine, source, inputs, folder, **arguments):
        collected.extend(steps for steps in inputs.steps if steps)
        original(engine, source, inputs, folder, **arguments)

    monkeypatch.setattr(stages, "record_prompts", record_prompts)
    quantize.quantize(
        tmp_path / "model", recipe=recipe, prompts=["red", "blue", "green"], out=tmp_path / "out", workers=1
    )
    if selection == "sds":
        assert sum(collected) == 3 * (8 + (first if trajectory == "quantized" else 0))

    machine = this_machine("cpu")
    planned = plan_model(source, recipe, machine=machine)
    shapes = block_shapes(source.meta_transformers(), teacher.linears, teacher.workload)
    step = sum(forward_work(shape, teacher.dtype).flop for shape in shapes) * teacher.workload.branches / 2
    assert planned.stages[0].flop == pytest.approx(step * sum(collected))

    clock, record_prompt = [0.0], measure.record_prompt

    def timed(teacher, inputs, folder, prompt, *, step_done):
        record_prompt(teacher, inputs, folder, prompt, step_done=step_done)
        clock[0] += 100 + inputs.steps[prompt]

    monkeypatch.setattr(measure, "record_prompt", timed)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(measure, "_blocks", lambda *args, **arguments: 0.0)
    seconds = measured(planned, source, recipe, machine=machine).stages[0].seconds
    assert seconds == pytest.approx(100 * len(collected) + sum(collected))


@pytest.mark.parametrize(("boundary", "expected"), [(None, (1, 5)), (0.7, (3, 12))])
def test_steps_in_which_every_transformer_is_called(boundary, expected):
    """Step i of n has noise s = 1 - i / n, shifted to 3 s / (1 + 2 s), which is below 0.7 for i > 0.5625 n."""
    teacher = load_teacher(
        tiny_pipeline("wan 2.2 a14b" if boundary else "wan", boundary_ratio=boundary),
        load_recipe("rtn-w4a6"),
        dtype=None,
    )
    settings = resolve_settings(teacher.pipe, requested=video_size(teacher.pipe))
    assert tuple(measure._steps_with(teacher, settings, calls) for calls in (1, 5)) == expected


def test_a_transformer_that_is_hardly_called_is_not_measured():
    teacher = load_teacher(tiny_pipeline("wan 2.2 a14b", boundary_ratio=1.0), load_recipe("rtn-w4a6"), dtype=None)
    settings = resolve_settings(teacher.pipe, requested=video_size(teacher.pipe))
    with pytest.raises(InvalidInputError, match="omit --measure"):
        measure._steps_with(teacher, settings, 5)


def test_each_kind_of_block_counts_as_often_as_there_are_blocks_of_it():
    recipe = load_recipe("rtn-w4a6")
    for pipe, kinds in (
        (tiny_pipeline("cogvideox", num_layers=3), [[0, 3]]),
        (tiny_pipeline("hunyuanvideo"), [[0, 1], [1, 1]]),
    ):
        teacher = load_teacher(pipe, recipe, dtype=None)
        assert [kind for _, *kind in measure._kinds(teacher)] == kinds
