"""Host time of a distillation step's launches beside its time on a GPU, by the formulas of `s2q plan --device`.

    python benchmarks/launches.py

A CUDA graph saves time only where the host takes longer to launch a step's operations than the GPU to compute them,
since the GPU queues. The step of the first block of published models is counted at their own length
(`planning.flop.step_work`), and the length below which the host takes longer is sought. Nothing is measured. Written to
``benchmarks/results/launches.json``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import environment
from records import write_record

from s2q.models.synthetic import SyntheticModel, synthetic_model
from s2q.planning.cost import Workload, block_shapes
from s2q.planning.flop import Work, in_tf32, step_work
from s2q.planning.gpus import EXPECTED, FAST, SLOW, Efficiency, Rates, gpu
from s2q.planning.resolve import recipe_linears, resolve
from s2q.recipes.load import load_recipe

RESULT = Path(__file__).parent / "results" / "launches.json"
MODELS = ("cogvideox-2b", "cogvideox-5b", "hunyuanvideo", "ltx-2b", "wan-1.3b", "wan-14b")
RECIPE = "s2q-plus-w4a6"
GPUS = ("h100", "4090")
RESOLUTION = 64


def counter(model: SyntheticModel) -> Callable[[int], Work]:
    """Return what counts a step on the first block, in bf16, for one sample of so many video tokens."""
    recipe, transformers = load_recipe(RECIPE), {"transformer": model.meta_transformer(blocks=1)}
    linears = resolve(recipe, recipe_linears(recipe, transformers), frames=model.frames)

    def work_of(tokens: int) -> Work:
        sizes = {"tokens": tokens, "frames": model.frames, "text_tokens": model.text_tokens}
        workload = Workload(**sizes, branches=1, rows=1, components=None)
        shape = block_shapes(transformers, linears, workload)[0]
        return in_tf32(step_work(shape, torch.bfloat16, checkpointed=False))

    return work_of


def on_device(work: Work, rates: Rates, efficiency: Efficiency = EXPECTED) -> float:
    """Return the seconds on the device, launches left out."""
    return rates.seconds(Work(work.products, work.attention, work.traffic, work.transfer), efficiency)


def on_host(work: Work, efficiency: Efficiency = EXPECTED) -> float:
    """Return the seconds of the launches on the host."""
    return work.launches * efficiency.launch_seconds


def equal_at(work_of: Callable[[int], Work], tokens: int, rates: Rates) -> int | None:
    """Return the number of video tokens up to the model's, to `RESOLUTION`, from which on the device takes longer."""

    def is_longer(length: int) -> bool:
        work = work_of(length)
        return on_device(work, rates) >= on_host(work)

    low, high = 0, tokens
    while high - low > RESOLUTION:
        middle = (low + high) // 2
        low, high = (low, middle) if is_longer(middle) else (middle, high)
    return high if is_longer(high) else None


def main() -> None:
    """Count every case, write the file."""
    rows: list[dict[str, Any]] = []
    for name in MODELS:
        model = synthetic_model(name)
        work_of = counter(model)
        work = work_of(model.tokens)
        for gpu_name in GPUS:
            rates = gpu(gpu_name)
            row = {"model": name, "tokens": model.tokens, "device": gpu_name, "launches": work.launches}
            row |= {"device_seconds": on_device(work, rates), "host_seconds": on_host(work)}
            row |= {"least_ratio": on_device(work, rates, FAST) / on_host(work, SLOW)}
            rows.append(row | {"equal_at_tokens": equal_at(work_of, model.tokens, rates)})
            print(rows[-1], flush=True)
    write_record(RESULT, {"schema_version": 1, **environment(), "recipe": RECIPE, "steps": rows})


if __name__ == "__main__":
    main()
