"""Recipes calibrated on videos of the default length, judged on longer ones, on an embedded model.

    python benchmarks/lengths.py -m shapes-wan [-r RECIPE ...] [--prompts 16] [--work DIR]

Each recipe is quantized once and judged against full precision at every length of ``LENGTHS``, with one seed, into
``benchmarks/results/lengths/MODEL/RECIPE.json``; existing files are skipped. ``--work`` keeps the checkpoints.
"""

import argparse
import logging
import tempfile
from pathlib import Path

import torch
from environment import environment
from records import rounded_metrics, write_record

from s2q.evaluation.measure import ReferenceRun, judge_model, run_reference
from s2q.evaluation.settings import EvaluationSettings
from s2q.evaluation.summary import summarise
from s2q.run.quantize import quantize
from s2q.shapes.embedded import EMBEDDED_NAMES, embedded_prompts, generation_defaults

RESULTS = Path(__file__).parent / "results" / "lengths"
LENGTHS = (9, 17, 33)
RECIPES = ("rtn-w4a6", "s2q-w4a6", "s2q-plus-w4a6")
logger = logging.getLogger("lengths")


def references(model: str, *, prompts: int) -> dict[int, ReferenceRun]:
    """Generate the full-precision videos of held-out prompts at every length, in fp32."""
    captions = embedded_prompts(model, split="held-out", count=prompts)
    return {
        frames: run_reference(
            model,
            prompts=captions,
            seeds=(0,),
            settings=EvaluationSettings(dtype="float32", requested={"num_frames": frames}),
        )
        for frames in LENGTHS
    }


def measure(checkpoint: Path, runs: dict[int, ReferenceRun]) -> dict[str, dict]:
    """Judge a checkpoint at every length; an `eval.json` for each, without versions."""
    judged = {}
    for frames, run in runs.items():
        result = summarise(judge_model(str(checkpoint), run))
        kept = {name: result[name] for name in ("n_prompts", "n_seeds", "metrics", "settings")}
        judged[str(frames)] = kept | {"videos": rounded_metrics(result["videos"])}
    return judged


def main() -> None:
    """Measure the recipes that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", required=True, choices=EMBEDDED_NAMES)
    parser.add_argument("-r", "--recipe", action="append")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--work", type=Path, help="folder to keep the checkpoints in")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    paths = {recipe: RESULTS / arguments.model / f"{recipe}.json" for recipe in arguments.recipe or RECIPES}
    missing = {recipe: path for recipe, path in paths.items() if not path.exists()}
    if not missing:
        return
    runs = references(arguments.model, prompts=arguments.prompts)
    for recipe, path in missing.items():
        with tempfile.TemporaryDirectory() as temporary:
            out = (arguments.work or Path(temporary)) / f"{arguments.model}-{recipe}"
            if not out.exists():
                quantize(arguments.model, recipe=recipe, out=out)
            record = {"model": arguments.model, "recipe": recipe, "lengths": measure(out, runs)}
        calibrated = generation_defaults(arguments.model)["num_frames"]
        write_record(path, record | {"calibrated_frames": calibrated} | environment())
        for frames, result in record["lengths"].items():
            means = {name: metric["mean"] for name, metric in result["metrics"].items()}
            logger.info(
                "%s %s, %s frames: velocity error %.2e, motion ratio %.3f, %.1f dB, adherence %.3f of %.3f",
                *(arguments.model, recipe, frames, means["velocity_relative_error"], means["motion_ratio"]),
                *(means["psnr_frame_mean_db"], means["adherence_all"], means["reference_adherence_all"]),
            )


if __name__ == "__main__":
    main()
