"""The second transformer of a pair, calibrated on videos that the quantized first one began."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline

from s2q.calibration import candidates
from s2q.calibration.teacher import load_teacher
from s2q.checkpoint import load_pipeline
from s2q.common.errors import InvalidInputError
from s2q.common.fingerprint import fingerprint
from s2q.common.run_folder import ArtefactFolder
from s2q.common.seeds import derive_seed
from s2q.generation.settings import GenerationSettings
from s2q.generation.trajectory import record_trajectory
from s2q.planning import plan
from s2q.recipes.load import load_recipe
from s2q.run import stages
from s2q.run.quantize import quantize
from tiny import tiny_pipeline, video_size

PROMPTS = ["a red circle", "a blue square"]
STEPS, BOUNDARY = 4, 0.9  # two of each
QUANTIZED = "calibration.trajectory_2=quantized"


@pytest.fixture(scope="module")
def pair():
    """A tiny pipeline with two transformers."""
    return tiny_pipeline("wan 2.2 a14b", boundary_ratio=BOUNDARY)


def settings(pipe):
    return {**video_size(pipe), "max_sequence_length": 16}


def options(pipe, *changes):
    sizes = [f"calibration.{name}={value}" for name, value in settings(pipe).items()]
    fast = ["calibration.n_prompts=2", f"calibration.steps={STEPS}", "calibration.samples=2"]
    return {"recipe": "quarot-w4a4", "prompts": PROMPTS, "overrides": [*sizes, *fast, *changes]}


@pytest.fixture(scope="module")
def folder(pair, tmp_path_factory):
    path = tmp_path_factory.mktemp("pair") / "model"
    pair.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def quantized(pair, folder, tmp_path_factory):
    """A checkpoint made in one go, and its report."""
    out = tmp_path_factory.mktemp("pair") / "out"
    report = quantize(folder, out=out, workers=1, **options(pair, QUANTIZED))
    return out, report


def weights(out, component):
    return b"".join(path.read_bytes() for path in sorted((out / component).glob("*.safetensors")))


def test_the_first_has_the_bytes_of_the_default_and_the_second_has_others(pair, folder, quantized, tmp_path):
    out, report = quantized
    default = quantize(folder, out=tmp_path / "default", workers=1, **options(pair))
    assert weights(out, "transformer") == weights(tmp_path / "default", "transformer")
    assert weights(out, "transformer_2") != weights(tmp_path / "default", "transformer_2")
    assert [block.name for block in report.blocks] == [block.name for block in default.blocks]
    assert [block.index for block in report.blocks] == list(range(len(report.blocks)))
    assert [stage["name"] for stage in report.stages] == [stage["name"] for stage in default.stages]
    assert report.selection["samples"] == default.selection["samples"] == 4
    assert report.selection["candidates"] == default.selection["candidates"] == 2 * STEPS
    assert sorted(path.name for path in (out / "s2q").iterdir()) == sorted(
        path.name for path in (tmp_path / "default" / "s2q").iterdir()
    )


def interrupted(monkeypatch, stage):
    """Stop a run when a function of it is called."""

    def stop(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, stage, stop)


def test_its_samples_are_what_the_quantized_first_transformer_leaves(pair, folder, quantized, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted(patch, "assemble")
        quantize(folder, out=tmp_path / "out", workers=1, **options(pair, QUANTIZED))
    recorded = ArtefactFolder(tmp_path / ".out.s2q-run").load("transformer_2.candidates-000")
    assert recorded.stats["transformers"] == ["transformer"] * 2 + ["transformer_2"] * 2
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    generation = GenerationSettings(**settings(pair), num_inference_steps=STEPS, guidance_scale=5.0)
    latents = {}
    for name in ("full precision", "quantized"):
        if name == "quantized":
            pipe.register_modules(transformer=load_pipeline(quantized[0]).transformer)
        seeds = [derive_seed(0, "prompt", 0)]
        trajectory = record_trajectory(pipe, PROMPTS[:1], seeds=seeds, settings=generation)
        latents[name] = torch.stack([call.inputs["hidden_states"][-1] for call in trajectory.calls])
    torch.testing.assert_close(recorded.tensors["inputs"], latents["quantized"])
    assert (recorded.tensors["inputs"][1:] - latents["full precision"][1:]).abs().max() > 1e-3


def test_a_run_killed_in_the_second_transformer_resumes_with_the_same_bytes(pair, folder, quantized, tmp_path):
    def kill(stage, done, total):
        if stage == "blocks" and done >= total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(folder, out=tmp_path / "out", workers=1, progress=kill, **options(pair, QUANTIZED))
    report = quantize(folder, out=tmp_path / "out", workers=1, **options(pair, QUANTIZED))
    first = [block.resumed for block in report.blocks if not block.name.startswith("transformer_2.")]
    assert first == [True] * len(first)
    for component in ("transformer", "transformer_2"):
        assert weights(tmp_path / "out", component) == weights(quantized[0], component)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["skip=['condition_embedder.*']", "attention.num_bits=8"])
def test_a_resumed_run_collects_again_where_the_first_is_quantized_otherwise(
    pair, folder, tmp_path, monkeypatch, change
):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted(patch, "assemble")
        quantize(folder, out=tmp_path / "out", workers=1, **options(pair, QUANTIZED))
    reports = [
        quantize(folder, out=tmp_path / name, workers=1, **options(pair, QUANTIZED, change))
        for name in ("out", "fresh")
    ]
    assert any(block.resumed for block in reports[0].blocks)
    assert not any(block.resumed for block in reports[1].blocks)
    assert weights(tmp_path / "out", "transformer_2") == weights(tmp_path / "fresh", "transformer_2")


def test_the_weights_are_hashed_once(pair, folder, tmp_path, monkeypatch):
    passes = []

    def hashed(teacher):
        passes.append(teacher)
        return parts_to_hash(teacher)

    parts_to_hash = candidates._parts_to_hash
    monkeypatch.setattr(candidates, "_parts_to_hash", hashed)
    interrupted(monkeypatch, "assemble")
    with pytest.raises(KeyboardInterrupt):
        quantize(folder, out=tmp_path / "out", workers=1, **options(pair, QUANTIZED))
    assert list((tmp_path / ".out.s2q-run").glob("transformer_2.candidates-000*")), "both rounds have collected"
    assert len(passes) == 1


def test_what_is_collected_is_known_by_model_and_content():
    """The fingerprint of runs without rounds, on which resumed runs depend, is that of content and weights."""
    pipe = tiny_pipeline("wan")
    recipe = load_recipe("s2q-w4a6", overrides=options(pipe)["overrides"])
    teacher = load_teacher(pipe, recipe, dtype=None)
    config = {key: value for key, value in pipe.config.items() if not key.startswith("_")}
    described = {
        "version": candidates._VERSION,
        "switches": {key: value for key, value in config.items() if key not in pipe.components},
        "configs": [dict(pipe.scheduler.config)],
        "device": "cpu",
    }
    inputs = candidates.prepare(teacher, PROMPTS, recipe.calibration, seed=0, inputs={"device": "cpu"})
    expected = fingerprint(json.loads(json.dumps(described, default=str)), [pipe.text_encoder, pipe.transformer])
    assert inputs.fingerprint == expected


def test_workers_give_the_same_bytes(forked, pair, folder, quantized, tmp_path):
    quantize(folder, out=tmp_path / "out", workers=2, **options(pair, QUANTIZED))
    for component in ("transformer", "transformer_2"):
        assert weights(tmp_path / "out", component) == weights(quantized[0], component)


def test_a_pair_with_one_skipped_is_calibrated_as_by_default(pair, folder, tmp_path):
    skip = "skip=['blocks.*']"
    for name, changes in (("default", (skip,)), ("quantized", (skip, QUANTIZED))):
        quantize(folder, out=tmp_path / name, workers=1, **options(pair, *changes, "outer=null"))
    assert weights(tmp_path / "default", "transformer_2") == weights(tmp_path / "quantized", "transformer_2")


def test_it_is_refused_where_there_is_no_pair():
    message = r"calibration.trajectory_2=quantized needs two transformers \(Wan 2.2 A14B\), got one; omit it"
    with pytest.raises(InvalidInputError, match=f"synthetic:wan-14b: {message}"):
        plan("synthetic:wan-14b", recipe="s2q-w4a6", overrides=[QUANTIZED])
    with pytest.raises(InvalidInputError, match=message):
        quantize((wan := tiny_pipeline("wan")), **options(wan, QUANTIZED), dry_run=True)
    plan("synthetic:wan-14b", recipe="rtn-w4a6", overrides=[QUANTIZED])  # does not calibrate
    with pytest.raises(InvalidInputError, match="allocation measures both transformers before either is quantized"):
        load_recipe("vidit-q-mp-w4a6", overrides=[QUANTIZED])


def test_the_steps_of_the_first_are_planned_twice():
    default, quantized = (
        plan("synthetic:wan-a14b", recipe="s2q-w4a6", device="h100", overrides=changes)
        for changes in ((), (QUANTIZED,))
    )
    assert quantized.stages[0].flop == pytest.approx(1.5 * default.stages[0].flop)
