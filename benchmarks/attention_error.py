"""Error of int8 attention on an embedded model, by itself and beside the linears of a recipe; held-out prompts.

    python benchmarks/attention_error.py -m shapes-wan [--prompts 16] [-r s2q-w4a6]

Velocity error of the full-precision model with int8 attention ("attention"), the same without the mean taken from the
keys ("attention, keys with their mean"), of the recipe ("s2q-w4a6"), and of the recipe with `attention.num_bits=8`
("s2q-w4a6, attention"), into ``benchmarks/results/attention/MODEL.json``. Blocks are calibrated with full-precision
attention, so the last two are one checkpoint with and without the key.
"""

import argparse
import itertools
import statistics
import tempfile
import unittest.mock
from pathlib import Path

import torch
from environment import environment
from records import rounded, write_record

from s2q.common.components import transformers_of
from s2q.evaluation.intervals import clustered_mean
from s2q.evaluation.measure import run_reference
from s2q.evaluation.settings import EvaluationSettings
from s2q.evaluation.velocity import velocity_errors
from s2q.generation.load import load_pipeline
from s2q.nn import quantize_attention, restore_attention
from s2q.ops.int8_attention import reference
from s2q.planning.resolve import quantized_attention
from s2q.recipes.load import load_recipe
from s2q.run.quantize import quantize
from s2q.shapes.embedded import EMBEDDED_NAMES, embedded_prompts

RESULTS = Path(__file__).parent / "results" / "attention"
INT8 = "attention.num_bits=8"


def measure(model: str, recipe: str, *, prompts: int) -> dict:
    """Return the record of a model: errors by variant and video, and their means."""
    captions = embedded_prompts(model, split="held-out", count=prompts)
    run = run_reference(
        model,
        prompts=captions,
        seeds=range(1),
        settings=EvaluationSettings(dtype="float32", metrics=("velocity_relative_error",)),
    )
    recordings = list(itertools.takewhile(bool, map(run.recordings.__getitem__, itertools.count())))

    def errors(transformers: dict) -> list[float]:
        videos = (video for recording in recordings for video in velocity_errors(transformers, recording))
        return [statistics.fmean(steps) for steps in videos]

    found = {}
    full = transformers_of(load_pipeline(model, dtype="float32"))
    names = quantized_attention(load_recipe(recipe, overrides=[INT8]), full)
    quantize_attention(full["transformer"], names)
    found["attention"] = errors(full)
    with unittest.mock.patch.object(reference, "token_mean", lambda key: torch.zeros_like(key[:, :, :1])):
        found["attention, keys with their mean"] = errors(full)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "checkpoint"
        quantize(model, recipe=recipe, out=out, overrides=[INT8])
        quantized = transformers_of(load_pipeline(out, dtype="float32"))
    found[f"{recipe}, attention"] = errors(quantized)
    restore_attention(quantized["transformer"])
    found[recipe] = errors(quantized)
    pairs = zip(found[f"{recipe}, attention"], found[recipe], strict=True)
    added = {caption: [both - linears] for caption, (both, linears) in zip(captions, pairs, strict=True)}
    return {
        "model": model,
        "recipe": recipe,
        "prompts": prompts,
        "attention_modules": len(names),
        "velocity_relative_error": {name: statistics.fmean(values) for name, values in found.items()},
        "added": vars(clustered_mean(added)),
        "videos": {name: [rounded(value) for value in values] for name, values in found.items()},
    }


def main() -> None:
    """Measure a model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", required=True, choices=EMBEDDED_NAMES)
    parser.add_argument("-r", "--recipe", default="s2q-w4a6")
    parser.add_argument("--prompts", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record = measure(arguments.model, arguments.recipe, prompts=arguments.prompts)
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_record(RESULTS / f"{arguments.model}.json", record | environment())
    for name, error in record["velocity_relative_error"].items():
        print(f"{arguments.model} {name}: {error:.3e}")


if __name__ == "__main__":
    main()
