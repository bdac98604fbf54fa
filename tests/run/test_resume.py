"""Runs that were killed, resumed, or shared by processes: the same bytes as those of an undisturbed run."""

import datetime
import json
import os
import pkgutil
import signal
import time

import pytest
import torch

from s2q.common.errors import InvalidInputError, UsageError
from s2q.run.quantize import quantize
from tiny import tiny_pipeline

pytestmark = pytest.mark.usefixtures("forked_workers")

FAST = ("calibration.steps=2", "calibration.samples=2", "calibration.n_prompts=2", "distillation.epochs=1")
FAST += ("calibration.num_frames=5", "calibration.height=16", "calibration.width=16")
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_killed_run_goes_on_with_the_same_result(folder, tmp_path, reference, count_blocks, interrupt, after):
    out = tmp_path / "out"
    with interrupt(after=after):
        quantize(folder, recipe="rtn-w4a6", out=out)
    assert not out.exists()
    report = quantize(folder, recipe="rtn-w4a6", out=out)
    assert len(count_blocks["computed"]) == 3 - after
    assert [block.resumed for block in report.blocks] == [index < after for index in range(3)]
    assert (out / WEIGHTS).read_bytes() == reference
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_killed_while_writing_leaves_nothing_that_loads_and_goes_on(folder, tmp_path, monkeypatch, reference):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("s2q.checkpoint.save.write_manifest", lambda staged: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quantize(folder, recipe="rtn-w4a6", out=out)
    assert not out.exists()
    assert all(path.name.startswith(".") for path in tmp_path.iterdir())
    report = quantize(folder, recipe="rtn-w4a6", out=out)
    assert all(block.resumed for block in report.blocks)
    assert (out / WEIGHTS).read_bytes() == reference
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def dies(function, *, before):
    """A function that kills its process: before the n-th call, or after the first for None."""
    calls = []

    def dying(*args, **kwargs):
        calls.append(args)
        if before is not None and len(calls) > before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if before is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return dying


@pytest.fixture
def run_until_killed(monkeypatch):
    """Run something in a copy of this process that is killed at a call of a function; see `dies`."""

    def run(work, name, *, before):
        owner, attribute = name.rsplit(".", 1)
        function = getattr(pkgutil.resolve_name(owner), attribute)
        child = os.fork()
        if child == 0:
            try:
                monkeypatch.setattr(name, dies(function, before=before))
                work()
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "before", "resumed"),
    [("s2q.run.runner.quantize_block", 1, 1), ("s2q.checkpoint.save.write_manifest", 0, 3)],
    ids=["in the second block", "before the manifest"],
)
def test_a_run_killed_by_sigkill_resumes_with_the_same_bytes(
    folder, tmp_path, reference, run_until_killed, name, before, resumed
):
    out = tmp_path / "out"
    run_until_killed(lambda: quantize(folder, recipe="rtn-w4a6", out=out), name, before=before)
    assert not out.exists()
    report = quantize(folder, recipe="rtn-w4a6", out=out)
    assert sum(block.resumed for block in report.blocks) == resumed
    assert (out / WEIGHTS).read_bytes() == reference
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


FINISHED = {
    "before clearing": ("s2q.common.run_folder.RunFolder.clear", 0),
    "in the middle of clearing": ("pathlib.Path.unlink", 9),  # three files of blocks are unlinked as they are saved
    "after clearing": ("s2q.common.run_folder.RunFolder.clear", None),
    "with an empty folder": ("pathlib.Path.rmdir", 0),
}


@pytest.mark.parametrize("moment", FINISHED)
def test_a_run_killed_when_its_checkpoint_was_in_place_is_finished_by_the_same_command(
    folder, tmp_path, reference, run_until_killed, count_blocks, moment
):
    out, (name, before) = tmp_path / "out", FINISHED[moment]
    run_until_killed(lambda: quantize(folder, recipe="rtn-w4a6", out=out), name, before=before)
    assert (out / WEIGHTS).read_bytes() == reference
    assert (tmp_path / ".out.s2q-run").is_dir()
    with pytest.raises(InvalidInputError, match="exists; pass --overwrite"):
        quantize(folder, recipe="rtn-w4a8", out=out)  # another command
    (tmp_path / ".out.s2q-run").mkdir(exist_ok=True)
    report = quantize(folder, recipe="rtn-w4a6", out=out)
    assert count_blocks["computed"] == []
    assert json.loads(json.dumps(report.to_dict())) == json.loads((out / "s2q/report.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(InvalidInputError, match="exists; pass --overwrite"):
        quantize(folder, recipe="rtn-w4a6", out=out)  # nothing was killed


def test_no_resume_starts_over(folder, tmp_path, count_blocks, interrupt):
    out = tmp_path / "out"
    with interrupt(after=2):
        quantize(folder, recipe="rtn-w4a6", out=out)
    quantize(folder, recipe="rtn-w4a6", out=out, resume=False)
    assert len(count_blocks["computed"]) == 3


@pytest.mark.parametrize(
    ("changed", "computed"),
    [
        ({"overrides": ["weights.num_bits=3"]}, 3),
        ({"seed": 1}, 3),
        ({"dtype": "float32"}, 3),
        ({"overrides": ["skip=['transformer_blocks.0.ff.*']"]}, 2),
        ({"overrides": ["description=other words"]}, 1),
    ],
)
def test_results_of_other_inputs_are_not_taken_over(folder, tmp_path, count_blocks, interrupt, changed, computed):
    """Two of three blocks are there; those whose inputs changed are computed again."""
    out = tmp_path / "out"
    with interrupt(after=2):
        quantize(folder, recipe="rtn-w4a6", out=out)
    quantize(folder, recipe="rtn-w4a6", out=out, **changed)
    assert len(count_blocks["computed"]) == computed


def test_a_resumed_run_names_the_inputs_that_changed(folder, tmp_path, interrupt, monkeypatch, caplog):
    versions = {"python": "3.11.7", "torch": "2.12.0"}
    monkeypatch.setattr("s2q.run.finished.package_versions", lambda: versions)
    out = tmp_path / "out"
    with interrupt(after=2):
        quantize(folder, recipe="rtn-w4a6", out=out)
    with interrupt(after=0):
        quantize(folder, recipe="rtn-w4a6", out=out)
    assert caplog.messages == [], "the same inputs"
    versions["torch"] = "2.13.0"
    changed = {"overrides": ["weights.num_bits=8"], "seed": 1, "prompts": ["a red circle"], "dtype": "float32"}
    quantize(folder, recipe="rtn-w4a6", out=out, **changed)
    (message,) = (
        message for message in caplog.messages if "inputs differ from those of the interrupted run" in message
    )
    for difference in ("recipe: weights.num_bits 4 → 8", "seed 0 → 1", "torch 2.12.0 → 2.13.0", "prompts differ"):
        assert difference in message
    assert "dtype None → torch.float32" in message
    assert message.endswith("; what depends on them is computed again")


def test_what_killed_writers_left_is_removed_at_the_next_start(folder, tmp_path, interrupt, monkeypatch):
    out = tmp_path / "out"
    with interrupt(after=1):
        quantize(folder, recipe="rtn-w4a6", out=out)
    run = tmp_path / ".out.s2q-run"
    left = ["process-17-stream-0000.safetensors", "targets-0003.safetensors", ".block-001.json.abcdefgh.partial"]
    for name in left:
        (run / name).write_bytes(b"half")
    with interrupt(after=1):
        quantize(folder, recipe="rtn-w4a6", out=out)
    kept = ["block-000", "block-001"]
    artefacts = [f"{name}.{suffix}" for name in kept for suffix in ("json", "safetensors")]
    assert sorted(path.name for path in run.iterdir()) == [*artefacts, "events.jsonl", "inputs.json", "lock"]


class BackwardClock(datetime.datetime):
    """A clock that is set back a day at every look."""

    days = 0

    @classmethod
    def now(cls, tz=None):
        cls.days += 1
        return datetime.datetime(2026, 11, 28, tzinfo=tz) - datetime.timedelta(days=cls.days)


def test_a_clock_that_is_set_back_changes_no_byte_and_no_duration(folder, tmp_path, reference, interrupt, monkeypatch):
    monkeypatch.setattr("s2q.common.run_folder.datetime", BackwardClock)
    monkeypatch.setattr(time, "time", lambda: -1000.0 * BackwardClock.days)
    out = tmp_path / "out"
    with interrupt(after=1):
        quantize(folder, recipe="rtn-w4a6", out=out)
    report = quantize(folder, recipe="rtn-w4a6", out=out)
    assert [block.resumed for block in report.blocks] == [True, False, False]
    assert (out / WEIGHTS).read_bytes() == reference
    assert report.seconds > 0
    assert all(stage["seconds"] > 0 for stage in report.stages)
    events = [json.loads(line) for line in (out / "s2q/events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["run", "block", "run", "block", "block", "block", "assemble"]
    assert [event["time"] for event in events] == sorted((event["time"] for event in events), reverse=True)


def test_other_weights_are_not_taken_over(folder, tmp_path, count_blocks, interrupt):
    out = tmp_path / "out"
    with interrupt(after=2):
        quantize(folder, recipe="rtn-w4a6", out=out)
    pipe = tiny_pipeline("cogvideox", num_layers=3, dtype=torch.bfloat16)
    with torch.no_grad():
        pipe.transformer.transformer_blocks[1].ff.net[2].weight[0, 0] += 1
    quantize(pipe, recipe="rtn-w4a6", out=out)
    assert [name.split(".")[1] for name in count_blocks["computed"]] == ["1", "2"]


def test_a_damaged_result_is_computed_again(folder, tmp_path, count_blocks, interrupt, reference):
    out = tmp_path / "out"
    with interrupt(after=2):
        quantize(folder, recipe="rtn-w4a6", out=out)
    artefact = tmp_path / ".out.s2q-run/block-000.safetensors"
    content = bytearray(artefact.read_bytes())
    content[-5] ^= 1
    artefact.write_bytes(content)
    (tmp_path / ".out.s2q-run/block-001.json").write_text("{")
    with (tmp_path / ".out.s2q-run/events.jsonl").open("a") as file:
        file.write('{"event": "torn')
    quantize(folder, recipe="rtn-w4a6", out=out)
    assert len(count_blocks["computed"]) == 3
    assert (out / WEIGHTS).read_bytes() == reference


def test_processes_with_a_small_memory_budget_give_the_bytes_of_one_process_without(tmp_path):
    model = tmp_path / "model"
    tiny_pipeline("wan 2.2 a14b", boundary_ratio=0.9).save_pretrained(model)
    arguments = {
        "recipe": "s2q-w4a6",
        "prompts": ["a red circle", "a blue square"],
        "overrides": FAST,
    }
    seen = []
    alone = quantize(model, out=tmp_path / "one", **arguments)
    progress = lambda *step: seen.append(step)  # noqa: E731
    report = quantize(model, out=tmp_path / "two", workers=2, memory_budget="1KB", progress=progress, **arguments)
    for component in ("transformer", "transformer_2"):
        file = f"{component}/diffusion_pytorch_model.safetensors"
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert not any(block.resumed for block in report.blocks)
    assert [block.attention for block in report.blocks] == [block.attention for block in alone.blocks]
    assert all(block.attention["map"] for block in report.blocks)
    done = [done for stage, done, _ in seen if stage == "blocks"]
    assert done == sorted(done)
    assert done[0] == 0
    assert seen[-1] == ("assemble", 1, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "one", "two"]


def test_processes_resume_what_is_finished(folder, reference, tmp_path, count_blocks, interrupt):
    with interrupt(after=2):
        quantize(folder, recipe="rtn-w4a6", out=tmp_path / "out")
    report = quantize(folder, recipe="rtn-w4a6", out=tmp_path / "out", workers=2)
    assert [block.resumed for block in report.blocks] == [True, True, False]
    assert count_blocks["computed"] == [], "the last block is another process's"
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == reference


def test_processes_have_nothing_to_do_when_all_blocks_are_finished(folder, reference, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("s2q.checkpoint.save.write_manifest", lambda staged: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quantize(folder, recipe="rtn-w4a6", out=out)
    report = quantize(folder, recipe="rtn-w4a6", out=out, workers=2)
    assert all(block.resumed for block in report.blocks)
    assert (out / WEIGHTS).read_bytes() == reference


def test_processes_need_a_model_by_name(folder, tmp_path):
    with pytest.raises(UsageError, match=r"workers=2 and a loaded pipeline; pass the name or folder"):
        quantize(tiny_pipeline("cogvideox"), recipe="rtn-w4a6", out=tmp_path / "out", workers=2)
    with pytest.raises(InvalidInputError, match="workers: got 0; expected at least 1"):
        quantize(folder, recipe="rtn-w4a6", out=tmp_path / "out", workers=0)
