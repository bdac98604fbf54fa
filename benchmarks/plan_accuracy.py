"""What `s2q plan --measure` says of a run on an embedded model, against the run.

    python benchmarks/plan_accuracy.py [-m shapes-cogvideox ...] [-r s2q-w4a6 ...]

Both run in processes of their own, one after the other, on a machine with nothing else to do. Written to
``benchmarks/results/plan-accuracy.json``: seconds and peak memory of every stage, planned and measured. What is
measured again takes the place of what was there.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from environment import environment
from records import write_record
from subprocesses import run_s2q

from s2q.shapes.embedded import EMBEDDED_NAMES

RESULT = Path(__file__).parent / "results" / "plan-accuracy.json"
RECIPES = ("s2q-w4a6", "rtn-w4a6")


def compare(model: str, recipe: str) -> dict[str, Any]:
    """Plan and run; return the stages beside each other."""
    common = ["-m", model, "-r", recipe, "--device", "cpu", "--json"]
    planned = json.loads(run_s2q("plan", *common, "--measure"))
    with tempfile.TemporaryDirectory() as folder:
        report = json.loads(run_s2q("quantize", *common, "-o", str(Path(folder) / "out")))
    stages = {stage["name"]: stage for stage in report["stages"]}
    rows = []
    for stage in planned["stages"]:
        row = {"stage": stage["name"]}
        for kind, source in (("planned", stage), ("measured", stages[stage["name"]])):
            row |= {f"{kind}_{key}": source[key] for key in ("seconds", "peak_memory_bytes")}
        rows.append(row)
    return {"model": model, "recipe": recipe, "stages": rows}


def _line(row: dict[str, Any]) -> str:
    seconds, memory = (
        [row[f"{kind}_{key}"] for kind in ("planned", "measured")] for key in ("seconds", "peak_memory_bytes")
    )
    planned = "not planned" if seconds[0] is None else f"planned {seconds[0]:.1f} s"
    return (
        f"{row['stage']}: {planned}, took {seconds[1]:.1f} s; "
        f"planned {memory[0] / 1e6:.0f} MB, took {memory[1] / 1e6:.0f} MB"
    )


def main() -> None:
    """Compare every model and recipe, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", action="append", choices=EMBEDDED_NAMES)
    parser.add_argument("-r", "--recipe", action="append")
    arguments = parser.parse_args()
    results = []
    for model in arguments.model or ("shapes-cogvideox", "shapes-wan"):
        for recipe in arguments.recipe or RECIPES:
            results.append(compare(model, recipe))
            print(model, recipe, *(_line(row) for row in results[-1]["stages"]), sep="\n  ", flush=True)
    again = {(run["model"], run["recipe"]) for run in results}
    before = json.loads(RESULT.read_text())["runs"] if RESULT.exists() else []
    kept = [run for run in before if (run["model"], run["recipe"]) not in again]
    write_record(RESULT, {"schema_version": 1, **environment(), "runs": kept + results})


if __name__ == "__main__":
    main()
