"""What a second transformer gains from calibration on videos that the quantized first transformer began.

    python benchmarks/pairs.py [--recipe s2q-w4a4] [--seeds 2] [--prompts 16] [--set K=V ...]

There is no embedded model with two transformers. The script makes one: `shapes-wan` with its transformer twice, and a
`boundary_ratio` that gives each half of the denoising steps. Both ways (`calibration.trajectory_2`) are judged on the
same held-out prompts: velocity error on the full-precision trajectory, PSNR of the final video. The first transformer
has the same bytes in both. Every run is stored by itself in ``benchmarks/results/pairs/RECIPE-WAY-SEED.json``; existing
files are skipped.
"""

import argparse
import copy
import shutil
import tempfile
from pathlib import Path

from diffusers import WanPipeline
from environment import environment
from records import rounded_metrics, write_record

from s2q.evaluation.evaluate import evaluate
from s2q.generation.defaults import generation_defaults
from s2q.generation.load import load_pipeline
from s2q.generation.settings import resolve_settings
from s2q.generation.sharing import steps_of_transformers
from s2q.models import resolve_model
from s2q.run.quantize import quantize
from s2q.shapes.embedded import embedded_prompts

MODEL = "shapes-wan"
WAYS = ("full_precision", "quantized")
METRICS = ("velocity_relative_error", "psnr")
RESULTS = Path(__file__).parent / "results" / "pairs"


def make_pair(folder: Path) -> float:
    """Write the pipeline with two transformers; return its `boundary_ratio`."""
    pipe = load_pipeline(MODEL, dtype="float32")
    parts = {**pipe.components, "transformer_2": copy.deepcopy(pipe.transformer)}
    for hundredths in range(99, 0, -1):
        pair = WanPipeline(**parts, boundary_ratio=hundredths / 100)
        settings = resolve_settings(pair, requested={}, defaults=generation_defaults(MODEL))
        if steps_of_transformers(pair, settings)["transformer_2"] <= settings.num_inference_steps // 2:
            break
    pair.save_pretrained(folder)
    shutil.copy(resolve_model(MODEL).folder / "generation.json", folder)
    return hundredths / 100


def measure(pair: Path, recipe: str, way: str, *, seed: int, prompts: list[str], overrides: list[str]) -> dict:
    """Quantize one way and judge the result."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "checkpoint"
        report = quantize(
            pair,
            recipe=recipe,
            out=out,
            prompts=embedded_prompts(MODEL, split="calibration", count=10),
            overrides=[*overrides, f"calibration.trajectory_2={way}"],
            seed=seed,
            dtype="float32",
            workers=1,
        )
        result = evaluate(
            out,
            reference=pair,
            prompts=prompts,
            seeds=[0],
            metrics=METRICS,
            **generation_defaults(MODEL),
            dtype="float32",
            workers=1,
        )
    peaks = {}
    for block in report.blocks:
        component = "transformer_2" if block.name.startswith("transformer_2.") else "transformer"
        peaks[component] = block.peak_memory_bytes
    return {
        "means": {name: entry["mean"] for name, entry in result["metrics"].items() if name in METRICS},
        "videos": rounded_metrics(result["videos"]),
        "final_losses": {block.name: block.loss["final"] for block in report.blocks},
        "peak_host_bytes_after": peaks,
        "stages": list(report.stages),
    }


def main() -> None:
    """Measure both ways with every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="s2q-w4a4")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    prompts = embedded_prompts(MODEL, split="held-out", count=arguments.prompts)
    command = f"python benchmarks/pairs.py --recipe {arguments.recipe} --seeds {arguments.seeds}"
    command += f" --prompts {arguments.prompts}" + "".join(f" --set {change}" for change in arguments.overrides)
    with tempfile.TemporaryDirectory() as scratch:
        pair = Path(scratch) / "shapes-wan-pair"
        boundary = make_pair(pair)
        for seed in range(arguments.seeds):
            for way in WAYS:
                path = RESULTS / f"{arguments.recipe}-{way.replace('_', '-')}-{seed}.json"
                if path.exists():
                    continue
                row = {"recipe": arguments.recipe, "trajectory_2": way, "seed": seed, "boundary_ratio": boundary}
                row |= {"overrides": arguments.overrides, "command": command}
                measured = measure(
                    pair, arguments.recipe, way, seed=seed, prompts=prompts, overrides=arguments.overrides
                )
                write_record(path, {"schema_version": 1, **row, **measured, **environment()})
                print(path.name, measured["means"], flush=True)


if __name__ == "__main__":
    main()
