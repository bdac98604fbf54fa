"""What each part of the method is worth: variants of a recipe, three seeds each, ranked by their velocity error.

    python benchmarks/ablations.py GROUP [-m shapes-cogvideox] [--seeds 3] [--prompts 32] [--only NAME ...]

A variant is a recipe of the package with overrides; the groups stand in ``GROUPS``. The seed of a run decides its
calibration videos, the random selections, the start of the rotations and the order of the samples. Every run is judged
on the same full-precision trajectories, those of held-out prompts, and stored by itself in
``benchmarks/results/ablations/MODEL/VARIANT-SEED.json``; what is there is skipped, so a killed run goes on where it
was, and groups share what they have in common. Two processes can share a group: ``--only`` divides it.
"""

import argparse
import json
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from environment import environment

from s2q.calibration import Trajectory, record_trajectory, resolve_settings
from s2q.core.components import transformers_of
from s2q.evaluation import generation_defaults
from s2q.evaluation.velocity import DEFINITION, velocity_errors
from s2q.loading import load_pipeline
from s2q.quantization import quantize
from s2q.recipes import load_recipe
from s2q.shapes.embedded import EMBEDDED_NAMES, embedded_prompts

RESULTS = Path(__file__).parent / "results" / "ablations"
BATCH = 16
logger = logging.getLogger("ablations")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of a table: a recipe with changes.

    Attributes:
        name: File name.
        label: What the table says.
        recipe: Name of a recipe of the package.
        overrides: As of ``--set``.
    """

    name: str
    label: str
    recipe: str
    overrides: tuple[str, ...] = ()


_UNTRAINED = ("distillation=null", "clip={}", "loss={}", "transforms.learn_scale=false", "calibration.selection=rtfp")
_CONSTANT_CLIP = {"w4a4": 0.77, "w4a6": 0.95}  # the first by the prototype, the second where its learned ones stayed


def _parts(width: str) -> list[Variant]:
    """Rounding, and each part of the method added in turn, everything else as in the recipe."""
    recipe = f"s2q-{width}"
    nearest, hadamard = "rounding.method=rtn", "transforms.rotation=hadamard"
    no_scale, no_rotation = "transforms.scale=none", "transforms.rotation=identity"
    clip = f"clip.constant={_CONSTANT_CLIP[width]}"
    uniform, random = "loss={}", "calibration.selection=rtfp"
    rows = [
        ("hadamard-gptq", "Hadamard + GPTQ, no scale", (*_UNTRAINED, hadamard, no_scale)),
        ("parts-1-scale", "scale", (*_UNTRAINED, nearest, no_rotation)),
        ("parts-2-hadamard", "+ Hadamard", (*_UNTRAINED, nearest, hadamard)),
        ("parts-3-gptq", "+ GPTQ", (*_UNTRAINED, hadamard)),
        ("parts-4-constant-clip", f"+ constant clip {_CONSTANT_CLIP[width]}", (*_UNTRAINED, hadamard, clip)),
        ("parts-5-learned-clips", "+ learned clips", (uniform, random, hadamard, "transforms.learn_scale=false")),
        ("parts-6-learned-kronecker", "+ learned scale and Kronecker", (uniform, random)),
        ("selection-rtfp", "+ STD", (random,)),
    ]
    return [
        Variant(name=f"rtn-{width}", label="rounding to nearest, adaLN too", recipe=f"rtn-{width}"),
        *(Variant(name=f"{recipe}-{n}", label=label, recipe=recipe, overrides=tuple(o)) for n, label, o in rows),
        Variant(name=recipe, label=f"+ SDS = `{recipe}`", recipe=recipe),
    ]


def _sweep(recipe: str, key: str, values: list[object], *, default: object) -> list[Variant]:
    """One field of a recipe over several values; its own value is the recipe itself, which all sweeps share."""
    short = key.partition(".")[2].replace("_", "-")
    return [
        Variant(name=recipe, label=f"`{key}={value}` (the recipe's)", recipe=recipe)
        if value == default
        else Variant(
            name=f"{recipe}-{short}-{value}", label=f"`{key}={value}`", recipe=recipe, overrides=(f"{key}={value}",)
        )
        for value in values
    ]


def _beyond(width: str) -> list[Variant]:
    """What is not in the paper, each part alone and together."""
    recipe, shift, branch = f"s2q-{width}", "transforms.shift=mean", "transforms.low_rank=32"
    bar = (*_UNTRAINED, "transforms.rotation=hadamard", "transforms.scale=none")
    rows = [
        ("hadamard-gptq", "Hadamard + GPTQ", bar),
        ("hadamard-gptq-shift", "Hadamard + GPTQ + shift", (*bar, shift)),
        ("hadamard-gptq-shift-low-rank", "Hadamard + GPTQ + shift + low-rank branch", (*bar, shift, branch)),
        ("", f"`{recipe}`", ()),
        ("selection-coverage", "+ coverage instead of SDS", ("calibration.selection=coverage",)),
        ("shift", "+ shift", (shift,)),
        ("low-rank", "+ low-rank branch", (branch,)),
        ("n-prompts-40", "+ 40 prompts, coverage", ("calibration.n_prompts=40", "calibration.selection=coverage")),
    ]
    return [
        *(
            Variant(name=f"{recipe}-{n}".rstrip("-"), label=label, recipe=recipe, overrides=tuple(o))
            for n, label, o in rows
        ),
        Variant(name=f"s2q-plus-{width}", label=f"+ all of them = `s2q-plus-{width}`", recipe=f"s2q-plus-{width}"),
    ]


GROUPS: dict[str, list[Variant]] = {
    "parts-w4a4": _parts("w4a4"),
    "parts-w4a6": _parts("w4a6"),
    "beyond-w4a4": _beyond("w4a4"),
    "beyond-w4a6": _beyond("w4a6"),
    "selection": _sweep(
        "s2q-w4a4", "calibration.selection", ["atop", "atfp", "rtfp", "ds", "qs", "sds"], default="sds"
    ),
    "lambda-min": _sweep("s2q-w4a4", "loss.lambda_min", [0, 0.2, 0.5, 0.8, 1], default=0.5),
    "samples": _sweep("s2q-w4a4", "calibration.samples", [20, 40, 80], default=40),
    "epochs": _sweep("s2q-w4a4", "distillation.epochs", [2, 5, 15, 30], default=15),
}


def reference_trajectories(model: str, count: int) -> list[Trajectory]:
    """Generate the videos of held-out prompts at full precision, in fp32, and keep every call of the transformer."""
    pipe = load_pipeline(model, dtype="float32")
    settings = resolve_settings(pipe, requested={}, defaults=generation_defaults(model))
    prompts = embedded_prompts(model, split="held-out", count=count)
    batches = [prompts[start : start + BATCH] for start in range(0, count, BATCH)]
    return [record_trajectory(pipe, batch, seeds=[0] * len(batch), settings=settings) for batch in batches]


def measure(model: str, variant: Variant, *, seed: int, trajectories: list[Trajectory]) -> dict:
    """Quantize one variant and answer the recorded calls with it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "checkpoint"
        report = quantize(model, recipe=variant.recipe, overrides=variant.overrides, out=out, seed=seed)
        students = transformers_of(load_pipeline(str(out), dtype="float32"))
    videos = []
    for trajectory in trajectories:
        errors = velocity_errors(students, trajectory)
        videos += [
            {"prompt": prompt, "velocity_relative_error": float(f"{sum(steps) / len(steps):.6g}")}
            for prompt, steps in zip(trajectory.prompts, errors, strict=True)
        ]
    mean = sum(video["velocity_relative_error"] for video in videos) / len(videos)
    recipe = load_recipe(variant.recipe, overrides=variant.overrides)
    return {
        "model": model,
        "variant": variant.name,
        "label": variant.label,
        "recipe": recipe.resolved(),
        "seed": seed,
        "definition": DEFINITION,
        "velocity_relative_error": mean,
        "videos": videos,
        "storage": dict(report.storage),
        "blocks": [block.loss for block in report.blocks],
        **environment(),
    }


def main() -> None:
    """Measure the runs of a group that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("-m", "--model", default=EMBEDDED_NAMES[0], choices=EMBEDDED_NAMES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--only", action="append", help="name of a variant; may be given again")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logger.setLevel(logging.INFO)
    torch.set_num_threads(1)
    folder = RESULTS / arguments.model
    folder.mkdir(parents=True, exist_ok=True)
    trajectories: list[Trajectory] = []
    for seed in range(arguments.seeds):
        for variant in GROUPS[arguments.group]:
            path = folder / f"{variant.name}-{seed}.json"
            if path.exists() or (arguments.only and variant.name not in arguments.only):
                continue
            trajectories = trajectories or reference_trajectories(arguments.model, arguments.prompts)
            result = measure(arguments.model, variant, seed=seed, trajectories=trajectories)
            path.write_text(json.dumps(result, separators=(",", ":")) + "\n")
            logger.info(
                "%s %s seed %d: %.3e",
                arguments.group,
                variant.name,
                seed,
                result["velocity_relative_error"],
            )


if __name__ == "__main__":
    main()
