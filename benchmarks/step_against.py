"""Steps of distillation of this code against those of another checkout, in one run.

    python benchmarks/step_against.py --before FOLDER [-m shapes-cogvideox ...] [-r s2q-w4a6 ...] [--rounds 60]

FOLDER is a checkout of an earlier commit (``git worktree add FOLDER COMMIT``). Each side is a process of one thread
with the first block of the model, as a run has it; the sides take single steps in turn, so that both meet the same
machine. The figure is the ratio of medians. Results are stored in ``benchmarks/results/step-against.json``.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
WARM_UP = 6


def serve(model: str, name: str) -> None:
    """Take a step for every line that is read; answer with its seconds."""
    import torch

    from s2q.benchmark.calibration_block import _pipeline_subject, first_block, first_optimization, first_student
    from s2q.benchmark.case import Settings
    from s2q.generation.defaults import generation_defaults
    from s2q.models.source import resolve_model
    from s2q.recipes.load import load_recipe

    torch.set_num_threads(1)
    recipe = load_recipe(name)
    settings = Settings(
        device="cpu",
        backends=(),
        recipes=(recipe,),
        options=None,
        tokens=None,
        blocks=1,
        attention=None,
        generation=generation_defaults(model),
    )
    with first_block(_pipeline_subject(resolve_model(model), settings), recipe, device="cpu") as opened:
        optimization = first_optimization(first_student(opened), recipe)
        samples = [opened.samples[index] for index in range(len(opened.samples))]
        for index, _ in enumerate(sys.stdin):
            started = time.perf_counter()
            loss = float(optimization.step(samples[index % len(samples)]))
            print("step", time.perf_counter() - started, loss, flush=True)


def step(process: subprocess.Popen) -> tuple[float, float]:
    """Have a side take a step; return its seconds and loss."""
    process.stdin.write("\n")
    process.stdin.flush()
    while not (line := process.stdout.readline()).startswith("step "):
        assert line, "the process ended"
    _, seconds, loss = line.split()
    return float(seconds), float(loss)


def compare(before: Path, model: str, recipe: str, *, rounds: int) -> dict:
    """Return medians of both sides, their ratio, and the first losses, which agree where both learn alike."""
    sides = {}
    for side, folder in (("before", before), ("after", HERE.parent)):
        environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--serve", model, recipe]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        sides[side] = subprocess.Popen(command, env=environment, **pipes)
    losses = {side: [step(process)[1] for _ in range(WARM_UP)] for side, process in sides.items()}
    seconds = {side: [] for side in sides}
    for _ in range(rounds):
        for side, process in sides.items():
            seconds[side].append(step(process)[0])
    for process in sides.values():
        process.stdin.close()
        process.wait()
    medians = {side: statistics.median(values) * 1000 for side, values in seconds.items()}
    return {
        "model": model,
        "recipe": recipe,
        "rounds": rounds,
        "milliseconds": medians,
        "fastest_milliseconds": {side: min(values) * 1000 for side, values in seconds.items()},
        "ratio": medians["before"] / medians["after"],
        "first_losses": losses,
    }


def main() -> None:
    """Compare all pairs of models and recipes; store the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--before", type=Path)
    parser.add_argument("-m", "--model", action="append")
    parser.add_argument("-r", "--recipe", action="append")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "step-against.json")
    arguments = parser.parse_args()
    if arguments.serve:
        serve(*arguments.serve)
        return
    from environment import environment
    from records import write_record

    commit = ["git", "-C", str(arguments.before), "rev-parse", "--short", "HEAD"]
    results = [
        compare(arguments.before, model, recipe, rounds=arguments.rounds)
        for model in arguments.model or ["shapes-cogvideox", "shapes-wan"]
        for recipe in arguments.recipe or ["s2q-w4a6", "s2q-plus-w4a6"]
    ]
    for result in results:
        print(f"{result['model']} {result['recipe']}: {result['milliseconds']} ms, ratio {result['ratio']:.2f}")
    before = subprocess.run(commit, capture_output=True, text=True, check=True).stdout.strip()
    record = {"before": before, "results": results} | environment()
    record["command"] = record["command"].replace(str(arguments.before), "FOLDER").split(" --out ")[0]
    write_record(arguments.out, record)


if __name__ == "__main__":
    main()
