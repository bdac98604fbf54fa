"""What each part of the method is worth: variants of a recipe, three seeds each, ranked by their velocity error.

    python benchmarks/ablations.py GROUP [-m shapes-cogvideox] [--seeds 3] [--prompts 32] [--only NAME ...]

A variant is a recipe of the package with overrides; the groups are in ``variants.GROUPS``. The seed of a run decides
its calibration videos, the random selections, the start of the rotations and the order of the samples. Every run is
judged on the same full-precision trajectories, those of held-out prompts with the model's generation settings or those
of ``variants.JUDGED``, and stored by itself in
``benchmarks/results/ablations/MODEL/VARIANT-SEED.json``; existing files are skipped, so a killed run resumes where it
was, and groups share what they have in common. Two processes can share a group: ``--only`` divides it.
"""

import argparse
import logging
import tempfile
from pathlib import Path

import torch
from environment import environment
from records import rounded, write_record
from variants import GROUPS, JUDGED, Variant

from s2q.common.components import transformers_of
from s2q.evaluation.definitions import definition_of
from s2q.evaluation.velocity import velocity_errors
from s2q.generation.defaults import generation_defaults
from s2q.generation.load import load_pipeline
from s2q.generation.settings import resolve_settings
from s2q.generation.trajectory import Trajectory, record_trajectory
from s2q.recipes.load import load_recipe
from s2q.run.quantize import quantize
from s2q.shapes.embedded import EMBEDDED_NAMES, embedded_prompts, starts_from_image

RESULTS = Path(__file__).parent / "results" / "ablations"
BATCH = 16
TEXT_TO_VIDEO = [name for name in EMBEDDED_NAMES if not starts_from_image(name)]
logger = logging.getLogger("ablations")


def reference_trajectories(model: str, count: int, *, requested: dict[str, float]) -> list[Trajectory]:
    """Generate the videos of held-out prompts at full precision, in fp32, and keep every call of the transformer."""
    pipe = load_pipeline(model, dtype="float32")
    settings = resolve_settings(pipe, requested=requested, defaults=generation_defaults(model))
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
            {"prompt": prompt, "velocity_relative_error": rounded(sum(steps) / len(steps))}
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
        "definition": definition_of("velocity_relative_error"),
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
    parser.add_argument("-m", "--model", default=TEXT_TO_VIDEO[0], choices=TEXT_TO_VIDEO)
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
    judged = JUDGED.get(arguments.group, {})
    for seed in range(arguments.seeds):
        for variant in GROUPS[arguments.group]:
            path = folder / f"{variant.name}-{seed}.json"
            if path.exists() or (arguments.only and variant.name not in arguments.only):
                continue
            trajectories = trajectories or reference_trajectories(arguments.model, arguments.prompts, requested=judged)
            result = measure(arguments.model, variant, seed=seed, trajectories=trajectories)
            write_record(path, result | ({"judged": judged} if judged else {}))
            logger.info(
                "%s %s seed %d: %.3e",
                arguments.group,
                variant.name,
                seed,
                result["velocity_relative_error"],
            )


if __name__ == "__main__":
    main()
