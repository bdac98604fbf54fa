"""Out of memory while a block is calibrated: once more with less, then one line; the result is the same."""

import pytest
import torch
from torch import nn

from overrides import overriding
from quick import quick, quick_if, slow
from s2q.blocks import distil, quantize_block
from s2q.calibration import samples, stream
from s2q.common.errors import ResourceError
from s2q.rounding import gptq
from s2q.run import allocate
from s2q.run.quantize import quantize
from tiny import tiny_pipeline

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
SMALL = ["calibration.steps=2", "calibration.samples=3", "distillation.epochs=2"]
CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def run(out, *changes, recipe="s2q-w4a6", **arguments):
    overrides = overriding(SMALL, changes) if recipe == "s2q-w4a6" else changes
    prompts = ["a red circle", "a blue square"]
    return quantize(
        tiny_pipeline("cogvideox"), recipe=recipe, out=out, prompts=prompts, overrides=overrides, **arguments
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    run(out)
    return (out / WEIGHTS).read_bytes()


STEPS = {
    "the stream": (stream.TeacherStream, "_pass"),
    "a sample": (samples.BlockSamples, "read"),
    "a step": (distil.Optimization, "step"),
    "the gradient": (distil.Optimization, "gradient"),
    "a Hessian": (gptq.GPTQ, "round"),
}


class Faults:
    """Raises an error in some calls of a function, by number."""

    def __init__(self, function, error, calls):
        self.function, self.error, self.calls, self.count = function, error, calls, 0

    def __get__(self, instance, owner=None):
        return lambda *args, **kwargs: self(instance, *args, **kwargs)

    def __call__(self, *args, **kwargs):
        self.count += 1
        if self.count in self.calls:
            raise self.error
        return self.function(*args, **kwargs)


def fail(monkeypatch, step, error=CUDA, *, calls):
    owner, name = STEPS[step]
    faults = Faults(vars(owner)[name], error, calls)
    monkeypatch.setattr(owner, name, faults)
    return faults


@pytest.mark.parametrize(
    ("step", "error"),
    [
        *quick_if(lambda step, _: step in ("the stream", "a step"), ((step, CUDA) for step in STEPS)),
        slow("a step", MemoryError()),
        ("a Hessian", RuntimeError("can't allocate memory")),
    ],
)
def test_a_block_is_tried_once_more_with_less_memory_and_the_same_result(
    step, error, undisturbed, tmp_path, monkeypatch, caplog
):
    tasks, original = [], quantize_block._quantized

    def quantized(task):
        tasks.append((task.index, task.checkpointed, task.piece))
        return original(task)

    monkeypatch.setattr(quantize_block, "_quantized", quantized)
    done = []
    first = 2 if step == "a sample" else 1
    fail(monkeypatch, step, error, calls=[first])
    report = run(tmp_path / "out", progress=lambda stage, count, total: done.append((stage, count, total)))
    (retried,) = [block for block in report.blocks if block.memory_retry]
    assert retried.memory_retry["gradient_checkpointing"] is True
    assert retried.memory_retry["piece"] == 1024
    assert retried.memory_retry["reason"] in (str(error), type(error).__name__)
    assert [settings[1:] for settings in tasks if settings[0] == retried.index] == [(False, 8192), (True, 1024)]
    assert len(tasks) == len(report.blocks) + 1
    assert any(f"{retried.name}: out of memory on cpu" in message for message in caplog.messages)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == undisturbed
    counts = [(count, total) for stage, count, total in done if stage == "blocks"]
    assert counts == sorted(counts)
    assert counts[-1] == (8, 8)


def test_a_stream_that_stopped_between_two_samples_starts_again(undisturbed, tmp_path, monkeypatch):
    put, calls = stream.TensorStore.put, []

    def failing(store, index, tensors):
        calls.append(store.name.rpartition("-")[2])
        if calls.count("stream") == 5:  # three inputs of the first block, then the second output of it
            raise torch.OutOfMemoryError("CUDA out of memory.")
        put(store, index, tensors)

    monkeypatch.setattr(stream.TensorStore, "put", failing)
    report = run(tmp_path / "out")
    assert [bool(block.memory_retry) for block in report.blocks] == [False, True]
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == undisturbed


@pytest.mark.parametrize("step", quick(["the stream", "a step", "a Hessian"], "a step"))
def test_the_second_failure_names_the_block_and_what_to_set_and_the_run_resumes(
    step, undisturbed, tmp_path, monkeypatch
):
    attempts, original = [], quantize_block._quantized

    def quantized(task):
        attempts.append(task.index)
        return original(task)

    monkeypatch.setattr(quantize_block, "_quantized", quantized)
    with monkeypatch.context() as patch:
        faults = fail(patch, step, calls=range(1, 10**6))
        with pytest.raises(ResourceError) as raised:
            run(tmp_path / "out")
    block = 1 if step == "the stream" else 0
    assert attempts.count(block) == faults.count == 2
    assert raised.value.exit_code == 4
    assert f"transformer_blocks.{block} on cpu" in str(raised.value)
    for remedy in ("calibration.num_frames", "calibration.precision=bfloat16", "larger device"):
        assert remedy in str(raised.value)
    report = run(tmp_path / "out")
    assert [reported.resumed for reported in report.blocks] == [index < block for index in range(2)]
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == undisturbed


def test_memory_that_runs_out_after_the_retry_of_another_block_is_another_retry(undisturbed, tmp_path, monkeypatch):
    fail(monkeypatch, "a step", calls=[1, 8])  # six steps of the first block after its retry
    report = run(tmp_path / "out")
    assert [bool(block.memory_retry) for block in report.blocks] == [True, True]
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == undisturbed


def test_a_recipe_without_samples_is_tried_once_more(tmp_path, monkeypatch):
    original, calls = quantize_block.fold_block, []

    def fold(task):
        calls.append(task.index)
        if len(calls) == 1:
            raise CUDA
        return original(task)

    monkeypatch.setattr(quantize_block, "fold_block", fold)
    report = run(tmp_path / "out", recipe="rtn-w4a6")
    assert calls == [0, 0, 1]
    assert [bool(block.memory_retry) for block in report.blocks] == [True, False]


def test_an_allocation_without_memory_names_its_block(tmp_path, monkeypatch):
    changes = ["calibration.steps=2", "calibration.samples=1", "allocation.samples=1"]

    def no_memory(*_args, **_kwargs):
        raise CUDA

    monkeypatch.setattr(allocate, "candidate_losses", no_memory)
    with pytest.raises(ResourceError, match=r"candidates of transformer_blocks\.0 on cpu; calibrate on smaller videos"):
        run(tmp_path / "out", *changes, recipe="vidit-q-mp-w4a6")


def test_other_errors_are_not_tried_again(tmp_path, monkeypatch):
    faults = fail(monkeypatch, "a step", RuntimeError("a defect"), calls=[1])
    with pytest.raises(RuntimeError, match="a defect"):
        run(tmp_path / "out")
    assert faults.count == 1


def test_feed_forward_parts_go_in_pieces_where_a_loss_is_computed_without_gradients():
    lengths = []
    block = tiny_pipeline("cogvideox", num_layers=1).transformer.transformer_blocks[0]
    block.ff.net[0].proj.register_forward_pre_hook(lambda _module, args: lengths.append(args[0].shape[1]))
    x = torch.randn(1, 10, 64)
    with torch.no_grad():
        whole = block.ff(x)
        with distil.checkpoint_parts(block, piece=4):
            pieces = block.ff(x)
    assert lengths == [10, 4, 4, 2]
    torch.testing.assert_close(pieces, whole)
    assert isinstance(block.ff, nn.Module)
    assert "forward" not in vars(block.ff)
