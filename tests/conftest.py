"""Settings of the whole suite: offline, one thread, quiet libraries. Set before torch or a hub client is imported.

Without a GPU, Triton interprets its kernels on the CPU; that too is decided before it is imported. With
S2Q_EMULATED_GPUS=1 there are two emulated GPUs, see tests/emulation/README.md.
"""

import functools
import gc
import json
import logging
import multiprocessing.context
import multiprocessing.forkserver
import os
import signal
import types

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in a shell's background job; processes of tests inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest.register_assert_rewrite("browser.harness")

from browser.harness import browser, visit  # noqa: E402, F401
from emulation import emulator  # noqa: E402

if os.environ.get(emulator.ENVIRONMENT_VARIABLE) == "1":
    emulator.install_if_possible()

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

GENERATION = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 32, "width": 32, "num_frames": 9}


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What libraries and test modules keep is no garbage: without it, collections take a tenth of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def every_dtype_has_arithmetic():
    """Models compute in the dtype that they are stored in, whatever CPU runs the tests.

    `emulated_half` and `own_arithmetic` change it.
    """
    from s2q.common import devices

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "has_arithmetic", lambda dtype: True)
        yield


@pytest.fixture(autouse=True)
def own_logging():
    """A command sends the logs to its stderr with a level of its own; the tests after it read all logs again."""
    logger = logging.getLogger("s2q")
    before = logger.level, logger.propagate, logger.handlers[:]
    yield
    logger.setLevel(before[0])
    logger.propagate, logger.handlers[:] = before[1:]


@pytest.fixture(scope="session", autouse=True)
def quick_runs():
    """No file is flushed to the disk, no selection is drawn, and HunyuanVideo 1.5 pads its texts to 450 tokens.

    Together these are half the time of a run on a tiny model. The published pipeline pads to 1,985 tokens. PNGs are
    compressed quickly, and tiny models that nothing refers to wait for the next collection.
    """
    from diffusers import HunyuanVideo15Pipeline
    from PIL import Image

    from s2q.calibration import calibration_set
    from s2q.common import devices

    initialize, save = HunyuanVideo15Pipeline.__init__, Image.Image.save

    def with_short_texts(pipe, *args, **kwargs):
        initialize(pipe, *args, **kwargs)
        pipe.tokenizer_max_length, pipe.tokenizer_2_max_length, pipe.vision_num_semantic_tokens = 400, 30, 20

    def save_quickly(image, *args, optimize=False, **kwargs):
        save(image, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(Image.Image, "save", save_quickly)
        if not torch.cuda.is_available():
            patch.setattr(devices, "gc", types.SimpleNamespace(collect=lambda: None))
        patch.setattr(calibration_set, "selection_plot", lambda record: b"\x89PNG not drawn in tests")
        patch.setattr(HunyuanVideo15Pipeline, "__init__", functools.wraps(initialize)(with_short_texts))
        yield


@pytest.fixture(scope="session", autouse=True)
def one_core():
    """Workers that a test does not ask for are not started: importing libraries takes longer than a tiny run."""
    from s2q.engines import options

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options, "cpu_count", lambda: 1)
        patch.setattr(options, "gpu_count", lambda: 1)
        yield


class ForkedContext(multiprocessing.context.ForkServerContext):
    """As `processes._SpawnContext`, with processes forked from a server that has imported the libraries."""

    def __init__(self):
        self.children = []

    def Process(self, *args, **kwargs):  # noqa: N802
        child = multiprocessing.context.ForkServerProcess(*args, **kwargs)
        self.children.append(child)
        return child


@pytest.fixture(scope="session")
def server_of_workers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.path.dirname(__file__), prepend=os.pathsep)
        multiprocessing.forkserver.set_forkserver_preload(["worker_imports"])
        multiprocessing.forkserver.ensure_running()


@pytest.fixture(scope="module")
def forked_workers(server_of_workers):
    """Workers start at once; imports take seconds otherwise. Some of tests/engines and tests/faults are spawned."""
    from s2q.engines import processes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "_SpawnContext", ForkedContext)
        yield


@pytest.fixture
def forked(server_of_workers, monkeypatch):
    """The workers that one test starts are forked."""
    from s2q.engines import processes

    monkeypatch.setattr(processes, "_SpawnContext", ForkedContext)


@pytest.fixture
def emulated_half(monkeypatch):
    """The CPU has no arithmetic of half precision."""
    from s2q.common import devices

    monkeypatch.setattr(devices, "has_arithmetic", lambda dtype: dtype == torch.float32)


@pytest.fixture
def own_arithmetic(monkeypatch):
    """Models compute in the default dtype of this CPU: emulated half precision takes several times as long."""
    from s2q.common import devices, processor

    monkeypatch.setattr(devices, "has_arithmetic", processor.has_arithmetic)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder with a random pipeline that takes captions of 96 characters."""
    from tiny import tiny_pipeline

    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipe = tiny_pipeline("cogvideox")
    torch.manual_seed(0)
    config = dict(pipe.transformer.config) | {"max_text_seq_length": 96}
    pipe.register_modules(transformer=type(pipe.transformer).from_config(config).eval())
    pipe.save_pretrained(folder)
    (folder / "generation.json").write_text(json.dumps(GENERATION))
    return folder


@pytest.fixture
def embedded_tiny(tiny_model, monkeypatch):
    """Makes the embedded names mean the tiny model, so that nothing depends on trained weights."""
    from s2q.shapes import embedded

    monkeypatch.setattr(embedded, "embedded_folder", lambda name: tiny_model)
    return "shapes-cogvideox"


@pytest.fixture
def no_encoding(monkeypatch):
    """Write empty videos: to start an encoder for each takes longer than all the rest."""
    monkeypatch.setattr("s2q.report.video.encode_mp4", lambda frames, **_: b"")
    for module in ("s2q.comparison.pages", "s2q.report.video"):
        monkeypatch.setattr(f"{module}.write_mp4", lambda path, frames, fps=None: path.write_bytes(b""))
