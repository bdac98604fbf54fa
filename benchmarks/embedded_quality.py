"""Quality of recipes on an embedded model, against its full precision, on prompts never trained on.

    python benchmarks/embedded_quality.py [-m shapes-cogvideox] [-r rtn-w4a6 ...] [--prompts 64] [--seeds 2] [--dtype
    float32] [--into quality]

Every recipe is quantized, evaluated and stored by itself in ``benchmarks/results/quality/MODEL/RECIPE.json``; a
recipe whose file exists is skipped, so a killed run resumes where it was (``--again`` measures again). Per-video
values are kept.
"""

import argparse
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from environment import environment
from records import rounded_metrics, write_record

from s2q.evaluation.measure import judge_model, run_reference
from s2q.evaluation.settings import EvaluationSettings
from s2q.evaluation.summary import summarise
from s2q.recipes.load import load_recipe, recipe_names
from s2q.run.quantize import quantize
from s2q.shapes.embedded import EMBEDDED_NAMES, embedded_prompts

RESULTS = Path(__file__).parent / "results"
logger = logging.getLogger("embedded_quality")


def measure(model: str, recipes: list[str], *, prompts: int, seeds: int, dtype: str) -> Iterator[tuple[str, dict]]:
    """Quantize and evaluate recipes; a record is `eval.json` with the run's cost and the environment added."""
    settings = EvaluationSettings(dtype=dtype)
    captions = embedded_prompts(model, split="held-out", count=prompts)
    reference = run_reference(model, prompts=captions, seeds=range(seeds), settings=settings)
    for recipe in recipes:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "checkpoint"
            report = quantize(model, recipe=recipe, out=out, workers=1)  # seconds are those of one thread
            result = summarise(judge_model(str(out), reference))
        result["videos"] = rounded_metrics(result["videos"])
        described = {"model": recipe, "reference": model, "storage": dict(report.storage)}
        yield recipe, result | described | {"quantize_seconds": report.seconds} | environment()


def main() -> None:
    """Measure the recipes that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", default=EMBEDDED_NAMES[0], choices=EMBEDDED_NAMES)
    parser.add_argument("-r", "--recipe", action="append", help="of the package, +sds or +std after it if wanted")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--into", default="quality", help="folder of results/ to write to")
    parser.add_argument("--dtype", default="float32", help="compute dtype of both sides")
    parser.add_argument("--again", action="store_true", help="measure recipes that have a result already")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    folder = RESULTS / arguments.into / arguments.model
    folder.mkdir(parents=True, exist_ok=True)
    wanted = []
    for recipe in arguments.recipe or recipe_names():
        load_recipe(recipe)
        if (folder / f"{recipe}.json").exists() and not arguments.again:
            logger.info("%s: %s.json is there", arguments.model, recipe)
        else:
            wanted.append(recipe)
    if not wanted:
        return
    for recipe, result in measure(
        arguments.model, wanted, prompts=arguments.prompts, seeds=arguments.seeds, dtype=arguments.dtype
    ):
        write_record(folder / f"{recipe}.json", result)
        means = {name: metric["mean"] for name, metric in result["metrics"].items()}
        logger.info(
            "%s %s: %.1f dB, velocity error %.2e, adherence %.3f; quantized in %.0f s",
            arguments.model,
            recipe,
            means["psnr_frame_mean_db"],
            means["velocity_relative_error"],
            means["adherence_all"],
            result["quantize_seconds"],
        )


if __name__ == "__main__":
    main()
