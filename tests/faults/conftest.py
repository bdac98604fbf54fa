"""A tiny model, the command that quantizes it, its undisturbed result, and the server that runs it."""

import pytest

from faults.commands import WORKERS, Commands, hashes
from tiny import tiny_pipeline

SMALL = (
    "calibration.steps=2",
    "calibration.samples=3",
    "calibration.num_frames=9",
    "calibration.height=16",
    "calibration.width=16",
    "distillation.epochs=1",
)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "tiny"
    tiny_pipeline("cogvideox").save_pretrained(folder)
    (folder / "generation.json").write_text("{}")  # what the embedded models have
    return folder


@pytest.fixture(scope="session")
def quantize_tiny(model):
    """The arguments of a run that calibrates two blocks, without its output; activations are on the disk."""
    prompts = model.parent / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    command = ["quantize", "-m", str(model), "-r", "s2q-w4a6", "--prompts", str(prompts), "--memory-budget", "1KB"]
    command += [WORKERS, "1"]
    return [*command, *(part for override in SMALL for part in ("--set", override)), "-o"]


@pytest.fixture(scope="session")
def commands(model, quantize_tiny, tmp_path_factory):
    server = Commands(tmp_path_factory.mktemp("commands"), model, [quantize_tiny[:-1]])
    yield server
    server.close()


@pytest.fixture(scope="session")
def undisturbed(commands, quantize_tiny, tmp_path_factory):
    """The events of an undisturbed run and the hashes of its checkpoint."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    return commands.events([*quantize_tiny, out]), hashes(out)
