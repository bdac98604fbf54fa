"""Error of exported checkpoints in the program that they are for, beside what that program's own quantization gives.

    pip install sdnq
    python benchmarks/exports.py [-m shapes-wan] [-r s2q-export-w4a8 ...] [--prompts 16] [--seeds 1]

Each recipe is quantized, exported to SDNQ, loaded by diffusers with SDNQ's code, and judged on the prompts and noise
that SDNQ's own W4A8 setting (``s2q.comparison.peers``) is judged on. Records are in ``results/exports/MODEL``; what has
one is skipped. ``--checkpoints DIR`` takes checkpoints ``DIR/MODEL+RECIPE`` instead of quantizing.
"""

import argparse
import logging
import tempfile
from pathlib import Path

import torch
from environment import environment
from records import rounded_metrics, write_record

import s2q
from s2q.common.versions import package_versions
from s2q.comparison.peers import cost_of_peer, find_peers, load_with_peer
from s2q.evaluation.measure import judge_model, run_reference
from s2q.evaluation.settings import EvaluationSettings
from s2q.evaluation.summary import summarise
from s2q.generation.load import load_pipeline
from s2q.models import resolve_model
from s2q.shapes.embedded import EMBEDDED_NAMES, embedded_prompts

RESULTS = Path(__file__).parent / "results" / "exports"
RECIPES = ("s2q-export-w4a8", "s2q-export-branch-w4a8")
PEER = "sdnq-w4a8"
logger = logging.getLogger("exports")


def exported(model: str, recipe: str, folder: Path, checkpoints: Path | None) -> tuple[Path, dict]:
    """Quantize and export; return the exported folder and the report's storage."""
    checkpoint = folder / "checkpoint" if checkpoints is None else checkpoints / f"{model}+{recipe}"
    if not checkpoint.exists():
        s2q.quantize(model, recipe=recipe, out=checkpoint)
    report = s2q.export(checkpoint, to="sdnq", out=folder / "exported")
    return folder / "exported", dict(report.storage)


def main() -> None:
    """Measure what has no result yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", default=EMBEDDED_NAMES[0], choices=EMBEDDED_NAMES)
    parser.add_argument("-r", "--recipe", action="append")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--checkpoints", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    folder, source = RESULTS / arguments.model, resolve_model(arguments.model)
    names = [PEER, *(arguments.recipe or RECIPES)]
    wanted = [name for name in names if not (folder / f"{name}.json").exists()]
    if not wanted:
        return
    settings = EvaluationSettings(dtype="float32")
    captions = embedded_prompts(arguments.model, split="held-out", count=arguments.prompts)
    reference = run_reference(source, prompts=captions, seeds=range(arguments.seeds), settings=settings)
    (peer,) = find_peers([PEER])
    for name in wanted:
        with tempfile.TemporaryDirectory() as scratch:
            if name == PEER:
                storage = cost_of_peer(peer, source)["storage"]
                pipe = load_with_peer(peer, source, dtype=settings.dtype)
            else:
                path, storage = exported(arguments.model, name, Path(scratch), arguments.checkpoints)
                pipe = load_pipeline(path, dtype=settings.dtype)
            result = summarise(judge_model(source, reference, pipe=pipe))
        result["videos"] = rounded_metrics(result["videos"])
        record = result | {"model": name, "reference": arguments.model, "storage": storage} | environment()
        record["versions"] |= package_versions((peer.package,))
        write_record(folder / f"{name}.json", record)
        error = result["metrics"]["velocity_relative_error"]["mean"]
        logger.info("%s %s: velocity error %.3e, ratio %.2f", arguments.model, name, error, storage["ratio"])


if __name__ == "__main__":
    main()
