"""Quantizing, generating and judging on a GPU that is too small for the pipeline: the same bytes, within the plan."""

import functools
import json
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

import s2q
from emulation import runs
from s2q.common.memory import paged
from s2q.evaluation import evaluate, parallel
from s2q.generation.offload import layers_of, leaving_device, pages_of, pipeline_on_device
from tiny import reloaded, tiny_pipeline, video_size

pytestmark = pytest.mark.gpu

MODELS = ["wan 2.2 a14b", "hunyuanvideo"]
WAYS = ["none", "model", "group"]
RECIPE = "quarot-w4a6"
OVERRIDES = ["calibration.n_prompts=1", "calibration.steps=2", "calibration.samples=1"]
SHORT_TEXTS = "calibration.max_sequence_length=16"  # whose encoding takes less than the weights, as in published sizes
DEEP = 4


@functools.cache
def deep_folder(model):
    """A tiny pipeline with more blocks than a GPU holds at a time."""
    pipe = tiny_pipeline(model, num_layers=DEEP)
    folder = Path(tempfile.mkdtemp()) / model.replace(" ", "-")
    pipe.save_pretrained(folder)
    (folder / "generation.json").write_text(json.dumps({"num_inference_steps": 2, **video_size(pipe)}))
    return folder


def load(model):
    pipe = reloaded(deep_folder(model), torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def weights(folder):
    """The bytes of the transformers' files."""
    return [path.read_bytes() for path in sorted(folder.glob("transformer*/*.safetensors"))]


def on_gpu(modules):
    """How many of some modules have a weight on a GPU."""
    return sum(any(tensor.device.type == "cuda" for tensor in module.parameters()) for module in modules)


@contextmanager
def watched(pipe):
    """Yield, for every call of a block, its component, and how many components and blocks of it are on the GPU."""
    seen = []
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]

    def look(name, blocks, *_):
        seen.append((name, on_gpu(parts), on_gpu(blocks)))

    with ExitStack() as stack:
        for name, blocks in pages_of(pipe).items():
            for block in blocks:
                stack.callback(block.register_forward_hook(functools.partial(look, name, blocks)).remove)
        yield seen


@pytest.mark.parametrize("model", MODELS)
def test_offload_changes_no_byte_and_is_within_the_plan(model, device, tmp_path):
    overrides, peaks, files = [*OVERRIDES, SHORT_TEXTS], {}, {}
    for way in WAYS:
        options = {"recipe": RECIPE, "device": device, "overrides": overrides, "offload": way}
        report = s2q.quantize(deep_folder(model), out=tmp_path / way, prompts=runs.PROMPTS, **options)
        planned = s2q.plan(deep_folder(model), **options)
        measured = {stage["name"]: stage["peak_memory_bytes"] for stage in report.stages}
        for stage in planned.stages:
            assert 0.8 * stage.peak_memory_bytes < measured[stage.name] < 1.2 * stage.peak_memory_bytes
        assert report.offload == planned.offload == way
        peaks[way], files[way] = measured["collect"], weights(tmp_path / way)
    assert files["none"] == files["model"] == files["group"]
    assert peaks["group"] < 0.8 * peaks["model"]
    assert peaks["model"] < 0.9 * peaks["none"]


def test_workers_that_share_a_gpu_plan_with_their_part_of_its_memory(device, monkeypatch):
    folder, overrides = deep_folder("wan 2.2 a14b"), [*OVERRIDES, SHORT_TEXTS]
    options = {"recipe": RECIPE, "overrides": overrides, "device": device}
    needed = s2q.plan(folder, **options, offload="none").stages[0].peak_memory_bytes
    monkeypatch.setattr("s2q.planning.cost.device_memory_bytes", lambda _device: int(1.5 * needed))
    planned = {
        workers: s2q.quantize(folder, **options, prompts=runs.PROMPTS, workers=workers, dry_run=True)
        for workers in (1, 2)
    }
    assert planned[1].offload == "none"
    assert planned[2].offload in ("model", "group")


@pytest.mark.parametrize("way", ["model", "group"])
@pytest.mark.parametrize("model", [*MODELS, "minimax-h3"])
def test_components_are_on_the_gpu_only_while_they_compute(model, way, device):
    pipe = load(model)
    expected = runs.latents(pipe, output_type="pt")
    with watched(pipe) as seen, pipeline_on_device(pipe, device, offload=way), leaving_device([pipe.transformer]):
        result = runs.latents(pipe, output_type="pt")
    assert runs.relative_error(result, expected) <= runs.DIGITS
    assert {name for name, *_ in seen} == pages_of(pipe).keys()
    assert {parts for _, parts, _ in seen} == {1}
    for name, blocks in pages_of(pipe).items():
        most = max(count for called, _, count in seen if called == name)
        assert most == (min(2, len(blocks)) if way == "group" else len(blocks))
    assert on_gpu([part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]) == 0


def test_the_parameters_after_a_stay_are_those_before_it(device):
    pipe = load("wan 2.2 a14b")
    before = [(id(tensor), tensor.data_ptr()) for tensor in pipe.transformer.parameters()]
    with pipeline_on_device(pipe, device, offload="group"):
        runs.latents(pipe)
        assert on_gpu([pipe.vae, pipe.text_encoder]) == 0
    assert [(id(tensor), tensor.data_ptr()) for tensor in pipe.transformer.parameters()] == before
    assert not any(hasattr(part, "_hf_hook") for part in pipe.transformer.modules())


@pytest.mark.parametrize("order", [[0, 1, 2, 0, 1, 2], [2, 1, 0], [0, 0, 1], [1]])
def test_paged_blocks_are_there_in_any_order(order, device):
    blocks = [torch.nn.Linear(4, 4) for _ in range(3)]
    x = torch.randn(2, 4)
    with paged(blocks, device):
        for index in order:
            result = blocks[index](x.to(device))
            assert result.device == torch.device(device)
            assert on_gpu(blocks) <= 2
            with torch.no_grad():
                inside = torch.nn.functional.linear(x, *(value.cpu() for value in blocks[index].parameters()))
            torch.testing.assert_close(result.cpu(), inside)
    assert on_gpu(blocks) == 0


def test_all_stays_copy_on_one_stream(device, monkeypatch):
    """PyTorch keeps what was freed for its stream: each further stream would hold blocks that nobody reads."""
    streams, enter = [], torch.cuda.stream
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: streams.append(stream) or enter(stream))
    blocks = [torch.nn.Linear(4, 4) for _ in range(3)]
    for _ in range(2):
        with paged(blocks, device):
            for block in blocks:
                block(torch.zeros(1, 4, device=device))
    assert len(streams) > len(blocks)
    assert len({id(stream) for stream in streams}) == 1


def test_a_block_that_fails_leaves_the_gpu(device):
    blocks = [torch.nn.Linear(4, 4) for _ in range(3)]
    with pytest.raises(RuntimeError), paged(blocks, device):
        blocks[0](torch.randn(2, 3).to(device))
    assert on_gpu(blocks) == 0


def test_layers_of_a_text_encoder_are_its_outermost_lists():
    encoder = load("wan 2.2 a14b").text_encoder
    assert layers_of(encoder) == list(encoder.encoder.block)


@pytest.mark.parametrize("way", ["model", "group"])
def test_generate_and_evaluate_on_a_small_gpu(way, device, tmp_path):
    checkpoint, reference = runs.on_cpu("wan 2.2 a14b", "rtn-w4a6").folder, runs.model_folder("wan 2.2 a14b")
    size = video_size(tiny_pipeline("wan 2.2 a14b")) | {"num_inference_steps": 2, "max_sequence_length": 16}
    plain, offloaded = (
        s2q.generate(checkpoint, prompts=["red"], **size, device=device, offload=name) for name in ("none", way)
    )
    assert torch.equal(plain[0].frames, offloaded[0].frames)
    scores = [
        s2q.evaluate(
            checkpoint,
            reference=reference,
            prompts=["red"],
            seeds=[0],
            metrics=["psnr", "velocity_relative_error"],
            **size,
            device=device,
            offload=name,
        )["metrics"]["velocity_relative_error"]["mean"]
        for name in ("none", way)
    ]
    assert scores[0] == scores[1] > 0


@pytest.mark.parametrize(
    ("way", "on_host", "loads"), [("none", 1, 4), ("model", 1, 2), ("group", 1, 2), ("group", 0, 4)]
)
def test_offloaded_models_are_loaded_once_for_all_shards(way, on_host, loads, device, monkeypatch):
    """On a GPU without room for both; what stays loaded is not on it."""
    loaded, load = [], evaluate.open_model

    def opened(model, settings, *, dtype):
        loaded.append((model, torch.cuda.memory_allocated(device)))
        return load(model, settings, dtype=dtype)

    monkeypatch.setattr(evaluate, "open_model", opened)
    monkeypatch.setattr(parallel, "models_that_fit", lambda _sources, name: on_host if name == "cpu" else 0)
    checkpoint, reference = runs.on_cpu("wan 2.2 a14b", "rtn-w4a6").folder, runs.model_folder("wan 2.2 a14b")
    size = video_size(tiny_pipeline("wan 2.2 a14b")) | {"num_inference_steps": 2, "max_sequence_length": 16}
    options = {"prompts": ["red", "blue", "green"], "seeds": [0], "metrics": ["velocity_relative_error"], **size}
    before = torch.cuda.memory_allocated(device)
    s2q.evaluate(checkpoint, reference=reference, device=device, offload=way, workers=1, **options)
    assert len(loaded) == loads
    assert max(allocated for _, allocated in loaded) <= before + 2**12


def test_kinds_of_linears_are_measured_alone_on_a_small_gpu(device):
    checkpoint, reference = runs.on_cpu("wan 2.2 a14b", "rtn-w4a6").folder, runs.model_folder("wan 2.2 a14b")
    size = video_size(tiny_pipeline("wan 2.2 a14b")) | {"num_inference_steps": 2, "max_sequence_length": 16}
    options = {"prompts": ["red"], "seeds": [0], "metrics": ["velocity_relative_error"], "sensitivity": 1, **size}
    results = [
        s2q.evaluate(checkpoint, reference=reference, device=device, offload=way, **options)["sensitivity"]
        for way in ("none", "model", "group")
    ]
    assert results[0] == results[1] == results[2]


def test_a_loaded_pipeline_with_offload_is_on_the_gpu_in_turn(device):
    folder = runs.on_cpu("wan 2.2 a14b", "rtn-w4a6").folder
    pipe = s2q.load(folder, device=device, offload="group")
    expected = runs.latents(s2q.load(folder, device=device))
    before = torch.cuda.memory_allocated(device)
    with leaving_device([pipe.transformer]):
        assert torch.equal(runs.latents(pipe), expected)
    assert torch.cuda.memory_allocated(device) <= before + 2**12


def test_auto_offloads_what_does_not_fit(device, monkeypatch):
    folder = runs.on_cpu("wan 2.2 a14b", "rtn-w4a6").folder
    sizes = [
        sum(tensor.nbytes for tensor in part.parameters())
        for part in s2q.load(folder).components.values()
        if isinstance(part, torch.nn.Module)
    ]
    for room, expected in ((2 * sum(sizes), sum(sizes)), (1.5 * max(sizes), 0)):
        monkeypatch.setattr("s2q.generation.offload.device_memory_bytes", lambda _device, room=room: int(room))
        before = torch.cuda.memory_allocated(device)
        pipe = s2q.load(folder, device=device, offload="auto")
        assert torch.cuda.memory_allocated(device) - before >= expected
        assert hasattr(pipe.transformer, "_hf_hook") == (expected == 0)
        del pipe
