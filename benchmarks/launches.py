"""Host time of a distillation step's launches beside its time on a GPU, by the formulas of `s2q plan --device`.

    python benchmarks/launches.py

A CUDA graph saves time only where the host takes longer to launch a step's operations than the GPU to compute them,
since the GPU queues. The step of the first block of published models is counted at their own length
(`planning.flop.step_work`), and the length below which the host takes longer is sought. Nothing is measured. Written
to ``benchmarks/results/launches.json``.
"""

from pathlib import Path
from typing import Any

import torch
from environment import environment
from records import write_record

from s2q.models.synthetic import SyntheticModel, synthetic_model
from s2q.planning.cost import Workload, block_shapes
from s2q.planning.flop import Work, step_work
from s2q.planning.gpus import EXPECTED, Rates, gpu
from s2q.planning.resolve import recipe_linears, resolve
from s2q.recipes.load import load_recipe

RESULT = Path(__file__).parent / "results" / "launches.json"
MODELS = ("cogvideox-2b", "cogvideox-5b", "hunyuanvideo", "ltx-2b", "wan-1.3b", "wan-14b")
RECIPES = ("s2q-w4a6", "s2q-plus-w4a6")
GPUS = ("h100", "4090")


def work_of(model: SyntheticModel, recipe_name: str, tokens: int) -> Work:
    """Count a step on the first block, in bf16, for one sample of so many video tokens."""
    recipe, transformers = load_recipe(recipe_name), {"transformer": model.meta_transformer(blocks=1)}
    workload = Workload(
        tokens=tokens, frames=model.frames, text_tokens=model.text_tokens, branches=1, rows=1, components=None
    )
    linears = resolve(recipe, recipe_linears(recipe, transformers), frames=model.frames)
    return step_work(block_shapes(transformers, linears, workload)[0], torch.bfloat16, checkpointed=False)


def seconds(work: Work, rates: Rates) -> tuple[float, float]:
    """Return the time on the device, launches left out, and that of the launches on the host."""
    host = work.launches * EXPECTED.launch_seconds
    return rates.seconds(Work(work.products, work.attention, work.traffic, work.transfer)), host


def fewest_tokens(model: SyntheticModel, recipe_name: str, rates: Rates) -> int:
    """Return the least number of video tokens, to 64, at which the device takes as long as the host."""
    low, high = 0, model.tokens
    while high - low > 64:
        middle = (low + high) // 2
        device, host = seconds(work_of(model, recipe_name, middle), rates)
        low, high = (low, middle) if device >= host else (middle, high)
    return high


def main() -> None:
    """Count every case, write the file."""
    rows: list[dict[str, Any]] = []
    for name in MODELS:
        model = synthetic_model(name)
        for recipe_name in RECIPES:
            work = work_of(model, recipe_name, model.tokens)
            for gpu_name in GPUS:
                device, host = seconds(work, gpu(gpu_name))
                row = {"model": name, "tokens": model.tokens, "recipe": recipe_name, "device": gpu_name}
                row |= {"launches": work.launches, "device_seconds": device, "host_seconds": host}
                rows.append(row | {"fewest_tokens": fewest_tokens(model, recipe_name, gpu(gpu_name))})
                print(rows[-1], flush=True)
    record = {"schema_version": 1, **environment(), "launch_seconds": EXPECTED.launch_seconds, "steps": rows}
    write_record(RESULT, record)


if __name__ == "__main__":
    main()
