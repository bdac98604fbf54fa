"""Host memory while blocks of a 13-billion model are calibrated: full width, two blocks, few tokens.

    python benchmarks/host_memory.py [--memory-budget 16GB] [--work DIR]

The model has one block of each kind of HunyuanVideo at its published width, with random weights in bf16; blocks are
read, calibrated and released one at a time, so 60 of them take no more than these. Few tokens, because on a CPU
weights, Hessians and their factorization decide. ``s2q quantize`` runs in a process of its own, whose highest resident
memory is compared with the plan's. Written to ``benchmarks/results/host-memory.json``.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import HunyuanVideoTransformer3DModel
from environment import environment
from records import write_record
from subprocesses import run_s2q

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from tiny import tiny_pipeline

RESULT = Path(__file__).parent / "results" / "host-memory.json"
RECIPE = "s2q-w4a6"
OVERRIDES = (
    "calibration.num_frames=5",
    "calibration.height=128",
    "calibration.width=128",
    "calibration.steps=2",
    "calibration.n_prompts=1",
    "calibration.samples=2",
    "distillation.epochs=2",
)


def build(folder: Path) -> None:
    """Save the pipeline: tiny except its transformer."""
    pipe = tiny_pipeline("hunyuanvideo", dtype=torch.bfloat16)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        transformer = HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=32,
            pooled_projection_dim=32,
        )
    finally:
        torch.set_default_dtype(torch.float32)
    pipe.register_modules(transformer=transformer)
    pipe.save_pretrained(folder)


def main() -> None:
    """Build, plan, quantize, compare."""
    parser = argparse.ArgumentParser(description="Host memory of calibrating blocks of HunyuanVideo's width.")
    parser.add_argument("--memory-budget", default="16GB")
    parser.add_argument("--work", type=Path, help="folder for model and checkpoint; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        model, out, prompts = work / "model", work / "quantized", work / "prompts.txt"
        if not (model / "model_index.json").exists():
            build(model)
        prompts.write_text("red\n")
        changes = [part for override in OVERRIDES for part in ("--set", override)]
        common = ["-m", str(model), "-r", RECIPE, "--memory-budget", arguments.memory_budget, "--device", "cpu"]
        common += changes
        planned = json.loads(run_s2q("plan", *common, "--json"))
        report = json.loads(
            run_s2q("quantize", *common, "-o", str(out), "--prompts", str(prompts), "--overwrite", "--json")
        )
    expected = max(stage["peak_memory_bytes"] for stage in planned["stages"])
    record = {
        "schema_version": 1,
        **environment(),
        "recipe": RECIPE,
        "overrides": OVERRIDES,
        "memory_budget": arguments.memory_budget,
        "model_bytes": report["storage"]["full_precision_bytes"],
        "planned": planned["stages"],
        "calibration": planned["calibration"],
        "stages": report["stages"],
        "blocks": [{key: block[key] for key in ("name", "seconds", "peak_memory_bytes")} for block in report["blocks"]],
        "peak_memory_bytes": report["peak_memory_bytes"],
    }
    write_record(RESULT, record)
    print(f"peak {report['peak_memory_bytes'] / 2**30:.2f} GiB, planned {expected / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
