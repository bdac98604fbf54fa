"""Verbs give the same bytes whatever state of torch their caller has set."""

import contextlib
import threading

import pytest
import torch
from diffusers import DiffusionPipeline

import s2q
from quick import quick
from s2q.benchmark.bench import make_cases, run_cases
from s2q.benchmark.case import Settings
from s2q.benchmark.machine import hardware, versions
from s2q.benchmark.results import ResultsFile
from s2q.benchmark.timing import TimingOptions
from s2q.common.errors import InvalidInputError
from s2q.common.torch_state import in_fresh_torch_state, tf32_products
from s2q.recipes.load import load_recipe
from states import STATES
from tiny import tiny_pipeline

SIZE = {"num_frames": 5, "height": 16, "width": 16}
SETTINGS = {**SIZE, "num_inference_steps": 2}
MEASURED = Settings(
    device="cpu",
    backends=("auto",),
    recipes=(load_recipe("s2q-w4a6"),),
    options=TimingOptions(repeats=1, seconds=0.1, sample_milliseconds=0.0),
    tokens=8,
    blocks=1,
    attention=None,
    generation={},
)
SMALL = [
    *(f"calibration.{key}={value}" for key, value in SIZE.items()),
    "calibration.steps=2",
    "calibration.samples=1",
    "calibration.n_prompts=1",
    "distillation.epochs=1",
]


def checkpoint_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "transformer").iterdir())}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "wan"
    tiny_pipeline("wan", num_layers=1).save_pretrained(folder)
    return folder


def calibrated(model, out):
    s2q.quantize(model, recipe="s2q-w4a6", out=out, prompts=["a red circle"], overrides=SMALL)
    return checkpoint_bytes(out)


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory):
    """The checkpoint that is made in no state but torch's own, with its bytes."""
    out = tmp_path_factory.mktemp("plain") / "out"
    return out, calibrated(model, out)


@pytest.mark.parametrize("state", quick(STATES, "default float16", "default device", "everything"))
def test_a_calibrating_run_gives_the_same_bytes(model, plain, state, tmp_path):
    with STATES[state]():
        assert calibrated(model, tmp_path / "out") == plain[1]


@pytest.mark.parametrize("state", quick(["inference_mode", "everything", "no_grad"], "everything"))
def test_a_pipeline_that_was_loaded_in_the_state_is_quantized_to_the_same_bytes(model, plain, state, tmp_path):
    with STATES[state]():
        pipe = s2q.load(model)
        assert calibrated(pipe, tmp_path / "out") == plain[1]


def test_a_pipeline_of_inference_tensors_is_quantized_to_the_same_bytes(model, plain, tmp_path):
    with torch.inference_mode():
        pipe = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
        assert calibrated(pipe, tmp_path / "inside") == plain[1]
    assert calibrated(pipe, tmp_path / "outside") == plain[1]


def outcomes(model, checkpoint):
    """What the other verbs give, in the state at hand."""
    pipe = s2q.load(checkpoint)
    (video,) = s2q.generate(checkpoint, prompts=["a red circle"], **SETTINGS)
    judged = s2q.evaluate(checkpoint, reference=model, prompts=["a red circle"], seeds=[0], **SETTINGS)
    return {
        "dtype": pipe.transformer.dtype,
        "parameters": [(one.dtype, one.device.type, one.is_inference()) for one in pipe.transformer.parameters()],
        "frames": video.frames.numpy().tobytes(),
        "latents": video.latents.numpy().tobytes(),
        "metrics": judged["metrics"],
        "velocity": judged["velocity"],
        "plan": s2q.plan(model, recipe="s2q-w4a6", overrides=SMALL).storage,
        "inspected": s2q.inspect(checkpoint).storage,
    }


@pytest.fixture(scope="module")
def plain_outcomes(model, plain):
    return outcomes(model, plain[0])


@pytest.mark.slow
@pytest.mark.parametrize("state", ["default bfloat16", "default device", "autocast float16", "everything"])
def test_the_other_verbs_give_the_same(model, plain, plain_outcomes, state):
    with STATES[state]():
        found = outcomes(model, plain[0])
    for name, wanted in plain_outcomes.items():
        assert found[name] == wanted, name


@pytest.mark.slow
def test_comparing_and_measuring_give_the_same_in_every_state(model, plain, tmp_path):
    found = {}
    states = {"plain": contextlib.nullcontext, **{name: STATES[name] for name in ("default float16", "everything")}}
    for name, context in states.items():
        with context():
            prompts, out = ["a red circle"], tmp_path / name
            done = s2q.compare([str(plain[0])], model=model, out=out, prompts=prompts, seeds=[0], **SETTINGS)
            results = ResultsFile(tmp_path / f"{name}.json", hardware=hardware("cpu"), versions=versions())
            run_cases(make_cases(None, ["activation_path"], MEASURED)[:1], results)
        found[name] = [entry["metrics"] for entry in done["entries"]]
    assert found["default float16"] == found["everything"] == found["plain"]


def test_the_default_dtype_stays_while_any_thread_runs_a_verb_and_is_given_back():
    seen, first_done, both_in = [], threading.Event(), threading.Barrier(2)

    @in_fresh_torch_state
    def verb(waits):
        both_in.wait()
        if waits:
            first_done.wait()
        seen.append(torch.ones(1).dtype)

    with STATES["default bfloat16"]():
        threads = [threading.Thread(target=verb, args=(waits,)) for waits in (False, True)]
        for thread in threads:
            thread.start()
        threads[0].join()
        first_done.set()
        threads[1].join()
        assert torch.get_default_dtype() == torch.bfloat16
    assert seen == [torch.float32] * 2


def test_a_verb_that_fails_gives_the_state_back(tmp_path):
    with STATES["default float16"](), torch.device("meta"), torch.no_grad():
        with pytest.raises(InvalidInputError):
            s2q.load(tmp_path)
        assert torch.get_default_dtype() == torch.float16
        assert torch.get_default_device().type == "meta"
        assert not torch.is_grad_enabled()


def test_tf32_products_are_a_gpus_and_end_with_the_last_context():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    with tf32_products("cpu"):
        assert matmul.fp32_precision == before
    outer, inner = tf32_products("cuda:0"), tf32_products("cuda:1")
    outer.__enter__()
    inner.__enter__()
    assert (matmul.fp32_precision, matmul.allow_tf32) == ("tf32", True)
    outer.__exit__(None, None, None)
    assert matmul.fp32_precision == "tf32"
    inner.__exit__(None, None, None)
    assert (matmul.fp32_precision, matmul.allow_tf32) == (before, False)
