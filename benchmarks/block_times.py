"""CPU seconds of what a run consists of: stages, prompts, blocks, and the stream that carries samples to a block.

    OMP_NUM_THREADS=1 python benchmarks/block_times.py [MODEL ...]

Each embedded model is quantized with s2q-w4a6 in one process of one thread. The clock is the CPU time of the process,
which other processes change little. Written to ``benchmarks/results/block-times.json``.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from environment import environment
from records import rounded, write_record

import s2q
from s2q.calibration.stream import TeacherStream
from s2q.common.fingerprint import fingerprint
from s2q.recipes.load import load_recipe
from s2q.run import stages, work

RECIPE = "s2q-w4a6"
RESULT = Path(__file__).parent / "results" / "block-times.json"


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """Return a function that also appends the CPU seconds of each call."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        result = function(*args, **kwargs)
        seconds.append(time.process_time() - started)
        return result

    return call


def measure_run(model: str, *, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Quantize an embedded model; return the CPU seconds of its parts."""
    recipe = load_recipe(RECIPE, overrides=overrides)
    parts: dict[str, list[float]] = {"prompts": [], "stream_starts": [], "stream_passes": [], "save": []}
    replaced = [
        mock.patch.object(work, "record_prompt", timed(work.record_prompt, parts["prompts"])),
        mock.patch.object(TeacherStream, "_start", timed(TeacherStream._start, parts["stream_starts"])),
        mock.patch.object(TeacherStream, "_pass", timed(TeacherStream._pass, parts["stream_passes"])),
        mock.patch.object(stages, "save_checkpoint", timed(stages.save_checkpoint, parts["save"])),
        mock.patch.object(time, "perf_counter", time.process_time),
    ]
    with tempfile.TemporaryDirectory() as folder:
        for patch in replaced:
            patch.start()
        try:
            report = s2q.quantize(model, recipe=recipe, out=Path(folder) / "out", workers=1, device="cpu")
        finally:
            mock.patch.stopall()
    return {
        "model": model,
        "recipe": RECIPE,
        "dtype": report.dtype,
        "samples": recipe.calibration.samples,
        "epochs": recipe.epochs,
        "stages": {stage["name"]: rounded(stage["seconds"]) for stage in report.stages},
        "seconds": rounded(report.seconds),
        "blocks": [rounded(block.seconds) for block in report.blocks],
        **{name: [rounded(value) for value in values] for name, values in parts.items()},
    }


def measure_start() -> float:
    """CPU seconds in which a worker imports what it needs."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", "import s2q.run.work"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return rounded(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def measure_hash() -> float:
    """Bytes of weights that a process hashes in a second."""
    layer = torch.nn.Linear(8192, 8192, bias=False)
    seconds: list[float] = []
    for _ in range(3):
        timed(fingerprint, seconds)({}, [layer])
    return rounded(layer.weight.nbytes / statistics.median(seconds))


def main() -> None:
    """Measure, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", default=["shapes-cogvideox"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    common = {"worker_start": measure_start(), "hash_bytes_per_second": measure_hash()}
    runs = [{**measure_run(model), **common} for model in arguments.models]
    write_record(RESULT, {"schema_version": 1, **environment(), "runs": runs})


if __name__ == "__main__":
    main()
