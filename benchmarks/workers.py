"""Time of `s2q quantize` with one worker and with several, in rounds, on a machine with nothing else to do.

    python benchmarks/workers.py --rounds 2
    python benchmarks/workers.py --before FOLDER      # also an earlier checkout, one process with all threads

Written to results/workers.json: seconds of each command, and whether the weights are equal.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from environment import environment

from s2q.common.files import atomic_write_json, sha256_file

RESULTS = Path(__file__).parent / "results" / "workers.json"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def run(flags: list[str], arguments: argparse.Namespace, *, source: Path | None = None) -> dict[str, Any]:
    """Time one command in a process of its own; PyTorch chooses its threads."""
    variables = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if source is not None:
        variables["PYTHONPATH"] = str(source / "src")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [sys.executable, "-m", "s2q", "quantize", "-m", arguments.model, "-r", arguments.recipe]
        started = time.perf_counter()
        subprocess.run([*command, "-o", str(out), *flags], env=variables, check=True, capture_output=True)
        return {"seconds": time.perf_counter() - started, "sha256": sha256_file(out / WEIGHTS)}


def main() -> None:
    """Run the commands in turn and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", default="shapes-cogvideox")
    parser.add_argument("-r", "--recipe", default="s2q-w4a6")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--before", type=Path)
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(arguments.rounds):
        for workers in arguments.workers:
            runs.setdefault(f"--workers {workers}", []).append(run(["--workers", str(workers)], arguments))
        if arguments.before is not None:
            done = run(["--processes", "1"], arguments, source=arguments.before.resolve())
            runs.setdefault("before: one process, all threads", []).append(done)
        for name, entries in runs.items():
            print(f"{name}: {entries[-1]['seconds']:.1f} s", flush=True)  # noqa: T201
    seconds = {name: [round(entry["seconds"], 2) for entry in entries] for name, entries in runs.items()}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    several = medians[f"--workers {max(arguments.workers)}"]
    hashes = {entry["sha256"] for name, entries in runs.items() if "--workers" in name for entry in entries}
    result = {
        **environment(),
        "date": datetime.now(UTC).date().isoformat(),
        "model": arguments.model,
        "recipe": arguments.recipe,
        "seconds": seconds,
        "speedup": {name: round(value / several, 3) for name, value in medians.items()},
        "equal_weights": len(hashes) == 1,
    }
    atomic_write_json(RESULTS, result)


if __name__ == "__main__":
    main()
