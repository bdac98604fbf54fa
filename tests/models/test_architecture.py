"""Models that cannot be compared are refused alike by every verb that compares, before any compute."""

import importlib
import json
import shutil

import pytest

from s2q.cli import run
from s2q.common.errors import InvalidInputError
from s2q.comparison.compare import compare
from s2q.evaluation.evaluate import evaluate
from s2q.evaluation.measure import judge_model, run_reference
from s2q.evaluation.settings import EvaluationSettings
from s2q.generation.load import load_pipeline
from s2q.models import resolve_model
from s2q.models.architecture import architecture_of, check_comparable
from s2q.run.quantize import quantize
from tiny import tiny_pipeline

SETTINGS = {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 16, "width": 16, "num_frames": 9}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Full-precision pipelines, and of some a checkpoint."""
    root = tmp_path_factory.mktemp("models")
    pipes = {
        "cogvideox": tiny_pipeline("cogvideox"),
        "deeper": tiny_pipeline("cogvideox", num_layers=3),
        "rotary": tiny_pipeline("cogvideox rotary"),
        "wan": tiny_pipeline("wan"),
        "wan-two": tiny_pipeline("wan 2.2 a14b", boundary_ratio=0.5),
        "ltx": tiny_pipeline("ltx"),
    }
    for name, pipe in pipes.items():
        pipe.save_pretrained(root / name)
        quantize(root / name, recipe="rtn-w4a6", out=root / f"{name}-q")
    changed = shutil.copytree(root / "wan-q", root / "other-encoder-q")
    index = json.loads((changed / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "T5EncoderModel"]
    (changed / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(changed / "s2q")
    return root


MISMATCHES = [
    ("deeper-q", "cogvideox", "its transformer has num_layers=3, that of the reference .*2"),
    (
        "cogvideox-q",
        "rotary",
        "its transformer has use_rotary_positional_embeddings=False, that .* True",
    ),
    ("cogvideox-q", "wan", "is a CogVideoXTransformer3DModel, that of the reference .* a WanTransformer3DModel"),
    ("ltx-q", "cogvideox", "is a LTXVideoTransformer3DModel, that of the reference .* a CogVideoXTransformer3DModel"),
    ("wan-two-q", "wan", "has transformer and transformer_2, the reference .* has transformer;"),
    ("wan-q", "wan-two", "has transformer, the reference .* has transformer and transformer_2;"),
    ("other-encoder-q", "wan", "its text_encoder is T5EncoderModel, that of the reference .* UMT5EncoderModel"),
    ("deeper", "cogvideox", "its transformer has num_layers=3, that of the reference .*2"),  # full precision too
]
VERBS = {
    "evaluate": lambda model, reference, out: evaluate(model, reference=reference, prompts=["a"], **SETTINGS),
    "evaluate, reference loaded": lambda model, reference, out: evaluate(
        model, reference=load_pipeline(reference), prompts=["a"], **SETTINGS
    ),
    "compare": lambda model, reference, out: compare([model], model=reference, out=out, prompts=["a"], **SETTINGS),
}


@pytest.fixture
def no_compute(monkeypatch):
    def compute(*_args, **_kwargs):
        raise AssertionError("generated a video although the models cannot be compared")

    judging = importlib.import_module("s2q.evaluation.measure")
    for name in ("denoise", "record_trajectory"):
        monkeypatch.setattr(judging, name, compute)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("model", "reference", "message"), MISMATCHES, ids=[f"{a}-{b}" for a, b, _ in MISMATCHES])
def test_a_mismatch_is_refused_alike_before_compute(models, tmp_path, no_compute, verb, model, reference, message):
    with pytest.raises(InvalidInputError, match=message) as caught:
        VERBS[verb](str(models / model), str(models / reference), tmp_path / "out")
    assert "compare it with the model that it was made from" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["eval", "compare"])
@pytest.mark.parametrize(("model", "reference", "message"), MISMATCHES[3:5], ids=["class", "two transformers"])
def test_a_mismatch_is_invalid_input_of_the_command_line(models, tmp_path, capsys, verb, model, reference, message):
    (tmp_path / "prompts.txt").write_text("a\n")
    given = {
        "eval": ["eval", "-m", models / model, "--reference", models / reference],
        "compare": ["compare", models / model, "-m", models / reference],
    }[verb]
    out = ["--prompts", tmp_path / "prompts.txt", "-o", tmp_path / "out"]
    assert run([str(word) for word in [*given, *out]]) == 3
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message.partition(",")[0] in line


def test_each_model_of_several_is_checked_when_it_is_loaded(models):
    settings = EvaluationSettings(requested=SETTINGS)
    reference = run_reference(models / "wan", prompts=["a"], seeds=(0,), settings=settings)
    with pytest.raises(InvalidInputError, match="has transformer and transformer_2, the reference .* has transformer;"):
        judge_model(models / "wan-two-q", reference)


@pytest.mark.parametrize("name", ["cogvideox", "wan", "wan-two", "ltx"])
def test_a_model_and_its_checkpoint_are_of_one_architecture_loaded_or_not(models, name):
    loaded = [architecture_of(load_pipeline(models / one), label=one) for one in (name, f"{name}-q")]
    resolved = [architecture_of(resolve_model(models / one), label=one) for one in (name, f"{name}-q")]
    for ours in (*loaded, *resolved):
        for theirs in (*loaded, *resolved):
            check_comparable(ours, theirs)
            assert ours.components == theirs.components


def test_another_scheduler_is_a_warning(models, tmp_path, caplog):
    folder = shutil.copytree(models / "wan", tmp_path / "shifted")
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "flow_shift": 5.0}))
    evaluate(str(folder), reference=str(models / "wan"), prompts=["a"], seeds=(0,), **SETTINGS)
    assert "its scheduler has flow_shift=5.0, that of the reference" in caplog.text
