"""A step of the embedded model while other processes compute: threads that spin against threads that sleep.

    python benchmarks/waiting_threads.py

Every figure is the median over rounds of one generated video, divided by its steps, in a process of its own with the
variables that it names. The other processes compute without a pause. Written to
``benchmarks/results/waiting-threads.json``.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from environment import environment
from records import rounded, write_record

import s2q

MODEL, RECIPE = "shapes-cogvideox", "quarot-w4a6"
STEPS, ROUNDS = 10, 3
OTHERS = (0, 2)
WAYS = {
    "2 threads, spinning": {"OMP_NUM_THREADS": "2"},
    "2 threads, asleep after 20,000 spins": {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "20000"},
    "2 threads, asleep at once": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"},
    "1 thread": {"OMP_NUM_THREADS": "1"},
}
RESULT = Path(__file__).parent / "results" / "waiting-threads.json"

TIMED = """
import json, sys, time, s2q
pipe = s2q.load(sys.argv[1])
seconds = []
for _ in range(1 + int(sys.argv[3])):
    started = time.perf_counter()
    s2q.generate(pipe, prompts=["a red circle moving left"], num_inference_steps=int(sys.argv[2]))
    seconds.append(time.perf_counter() - started)
print(json.dumps(seconds[1:]))
"""
BUSY = "while True: sum(range(10**6))"


def milliseconds_a_step(model: str, variables: dict[str, str], others: int) -> float:
    """Time steps of a model in a process with these variables, beside so many other processes."""
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))
    } | variables
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(others)]
    try:
        command = [sys.executable, "-c", TIMED, model, str(STEPS), str(ROUNDS)]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    return rounded(1000 * statistics.median(json.loads(done.stdout)) / STEPS)


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = str(Path(folder) / "quantized")
        s2q.quantize(MODEL, recipe=RECIPE, out=checkpoint)
        for others in OTHERS:
            for way, variables in WAYS.items():
                full, quantized = (milliseconds_a_step(model, variables, others) for model in (MODEL, checkpoint))
                rows.append({"others": others, "way": way, "full_precision_ms": full, "quantized_ms": quantized})
                print(json.dumps(rows[-1]), flush=True)
    write_record(RESULT, {"schema_version": 1, "model": MODEL, "recipe": RECIPE, **environment(), "rows": rows})


if __name__ == "__main__":
    main()
