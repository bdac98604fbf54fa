"""What narrow scales, transforms and bases cost, and 8-bit linears outside the blocks, against the same run without.

    python benchmarks/storage_error.py LABEL -m MODEL -r RECIPE [-s KEY=VALUE ...] [--prompts 16]

LABEL names what is measured: "fp32" is a revision before checkpoint format 4, with its own sources in PYTHONPATH, "16"
is this one. One calibration gives two velocity errors: that of the checkpoint, and that of its blocks alone, with the
linears outside in full precision, on which the calibration of the blocks does not depend. Records are
``results/storage/MODEL/RECIPE-LABEL.json``; those of "16" are compared with those of "fp32", prompt by prompt.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from ablations import reference_trajectories
from environment import environment
from markdown_tables import table_head, table_row
from records import rounded, write_record

from s2q.common.components import transformers_of
from s2q.evaluation.paired import paired_differences
from s2q.evaluation.velocity import velocity_errors
from s2q.generation.load import load_pipeline
from s2q.models import family_of
from s2q.nn import PackedLinear, replace_module
from s2q.run.quantize import quantize
from s2q.shapes.embedded import EMBEDDED_NAMES

RESULTS = Path(__file__).parent / "results" / "storage"
METRIC = "velocity_relative_error"


def measure(model: str, recipe: str, overrides: list[str], *, prompts: int) -> dict[str, Any]:
    """Quantize, and answer the calls of full precision with the checkpoint and with its blocks alone."""
    trajectories = reference_trajectories(model, prompts)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "checkpoint"
        report = quantize(model, recipe=recipe, overrides=overrides, out=out)
        students = transformers_of(load_pipeline(str(out), dtype="float32"))
    record = {"model": model, "recipe": recipe, "overrides": overrides, "storage": dict(report.storage)}
    record["blocks"] = [block.loss for block in report.blocks]
    record["videos"] = _judged(students, trajectories)
    originals = transformers_of(load_pipeline(model, dtype="float32"))
    names = [(component, name) for component in students for name in _packed_outside(students[component])]
    for component, name in names:
        replace_module(students[component], name, originals[component].get_submodule(name))
    if names:
        record["videos_outer_full"] = _judged(students, trajectories)
    return record | environment()


def _packed_outside(transformer: Any) -> list[str]:
    blocks = tuple(f"{name}." for name in family_of(transformer).block_lists)
    modules = transformer.named_modules()
    return [name for name, one in modules if isinstance(one, PackedLinear) and not name.startswith(blocks)]


def _judged(students: Any, trajectories: list[Any]) -> list[dict[str, Any]]:
    return [
        {"prompt": prompt, "seed": 0, "metrics": {METRIC: rounded(sum(steps) / len(steps))}}
        for trajectory in trajectories
        for prompt, steps in zip(trajectory.prompts, velocity_errors(students, trajectory), strict=True)
    ]


def storage_error_table(_: str) -> str:
    """Velocity error in 16 bits relative to that in fp32, with and without 8-bit linears outside the blocks."""
    head = ["recipe", "velocity error, fp32", "blocks in 16 and 8 bits", "and outer in 8 bits", "reduction"]
    lines = table_head("model", head)
    for path in sorted(RESULTS.glob("*/*-16.json")):
        now = json.loads(path.read_text())
        before = json.loads(path.with_name(path.name.replace("-16.json", "-fp32.json")).read_text())
        cells = [f"`{now['recipe']}`{', not learned' if now['overrides'] else ''}", f"{_mean(before['videos']):.3g}"]
        cells += [_ratio(now[key], before["videos"]) for key in ("videos_outer_full", "videos")]
        ratios = (record["storage"]["ratio"] for record in (before, now))
        lines.append(table_row(f"`{now['model']}`", [*cells, " → ".join(f"{ratio:.2f}" for ratio in ratios)]))
    return "\n".join(lines)


def _mean(videos: list[Any]) -> float:
    return sum(video["metrics"][METRIC] for video in videos) / len(videos)


def _ratio(videos: list[Any], before: list[Any]) -> str:
    ratio = paired_differences(videos, before)[METRIC]
    return f"{ratio.estimate:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def main() -> None:
    """Measure one recipe on one model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("label", choices=("fp32", "16"))
    parser.add_argument("-m", "--model", default=EMBEDDED_NAMES[0], choices=EMBEDDED_NAMES)
    parser.add_argument("-r", "--recipe", default="s2q-w4a6")
    parser.add_argument("-s", "--set", action="append", default=[], help="KEY=VALUE")
    parser.add_argument("--prompts", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record = measure(arguments.model, arguments.recipe, arguments.set, prompts=arguments.prompts)
    suffix = "-not-learned" if arguments.set else ""
    write_record(RESULTS / arguments.model / f"{arguments.recipe}{suffix}-{arguments.label}.json", record)


if __name__ == "__main__":
    main()
