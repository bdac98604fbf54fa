"""Estimated time of distillation steps on this CPU beside the measured one: what `s2q plan --device` computes for GPUs.

    python benchmarks/step_estimates.py

The CPU's rates are measured first: an fp32 product, a pass over memory, a small operation. The formulas are those of
`planning.flop`, with the efficiency of 1 that measured rates have. One thread, fp32, CPU time of a call
after one to warm up, in which other processes do not count. Written to ``benchmarks/results/step-estimates.json``.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from environment import environment
from records import write_record

from s2q.benchmark.calibration_block import Subject, first_block, first_optimization, first_student, synthetic_subject
from s2q.benchmark.synthetic_blocks import synthetic_block
from s2q.models.synthetic import synthetic_model
from s2q.planning.cost import Workload, block_shapes
from s2q.planning.flop import step_work
from s2q.planning.gpus import Efficiency, Rates
from s2q.planning.resolve import resolve
from s2q.recipes.load import load_recipe

RESULT = Path(__file__).parent / "results" / "step-estimates.json"
CASES = (("cogvideox-2b", 256), ("cogvideox-2b", 1024))
RECIPES = ("s2q-w4a6",)
MEASURED = {"products": 1.0, "attention": 1.0, "memory": 1.0, "link": 1.0}
ROUNDS = 1


def seconds_of(run: Callable[[], object], *, rounds: int = ROUNDS) -> float:
    """Return the median CPU time of calls, after one that is not counted."""
    taken = []
    for _ in range(rounds + 1):
        started = time.process_time()
        run()
        taken.append(time.process_time() - started)
    return median(taken[1:])


def cpu_rates() -> tuple[Rates, Efficiency]:
    """Measure what this CPU reaches on one thread."""
    matrix, vector, small = torch.randn(2048, 2048), torch.randn(1 << 25), torch.randn(64)
    flops = 2 * 2048**3 / seconds_of(lambda: matrix @ matrix)
    bandwidth = 2 * vector.nbytes / seconds_of(lambda: torch.mul(vector, 2.0, out=vector))
    launch = seconds_of(lambda: [small * 2.0 for _ in range(1000)]) / 1000
    rates = Rates(
        name="cpu",
        title="this CPU",
        flops={"fp32": flops},
        memory_bytes=0,
        bandwidth=bandwidth,
        link=bandwidth,
        source="measured",
        queues=False,
    )
    return rates, Efficiency(**MEASURED, launch_seconds=launch)


@contextmanager
def subject_of(name: str, tokens: int) -> Iterator[tuple[Subject, Workload]]:
    """Return the first block of a published model with random weights, and the size of its samples."""
    model, generator = synthetic_model(name), torch.Generator().manual_seed(0)
    block_list = model.block_lists[0]
    block = synthetic_block(model, block_list, generator=generator, dtype=torch.float32)
    subject = synthetic_subject(model, block_list, block, tokens=tokens, generator=generator)
    grid = subject.tokens.grid(subject.calls[0])
    workload = Workload(
        tokens=grid.frames * grid.height * grid.width,
        frames=grid.frames,
        text_tokens=model.text_tokens,
        branches=1,
        rows=1,
        components=None,
    )
    yield subject, workload


def compare(name: str, tokens: int, recipe_name: str, rates: Rates, efficiency: Efficiency) -> dict[str, Any]:
    """Measure a step and estimate it."""
    recipe, model = load_recipe(recipe_name), synthetic_model(name)
    with subject_of(name, tokens) as (subject, workload):
        transformers = {"transformer": model.meta_transformer(blocks=1)}
        shape = block_shapes(transformers, resolve(recipe, subject.linears), workload)[0]
        work = step_work(shape, torch.float32, checkpointed=False)
        with first_block(subject, recipe, device="cpu") as opened:
            step, sample = first_optimization(first_student(opened), recipe).step, opened.samples[0]
            measured = seconds_of(lambda: step(sample))
    estimated = rates.seconds(work, efficiency)
    return {
        "model": f"synthetic:{name}",
        "tokens": workload.tokens,
        "recipe": recipe_name,
        "flop": work.flop,
        "traffic_bytes": work.traffic,
        "estimated_seconds": estimated,
        "measured_seconds": measured,
        "ratio": estimated / measured,
    }


def main() -> None:
    """Compare every case, write the file."""
    torch.set_num_threads(1)
    rates, efficiency = cpu_rates()
    steps = []
    for name, tokens in CASES:
        for recipe in RECIPES:
            steps.append(compare(name, tokens, recipe, rates, efficiency))
            print(
                {key: steps[-1][key] for key in ("model", "tokens", "recipe", "estimated_seconds", "ratio")}, flush=True
            )
    figures = {
        "fp32_flops": rates.flops["fp32"],
        "bandwidth": rates.bandwidth,
        "launch_seconds": efficiency.launch_seconds,
    }
    write_record(RESULT, {"schema_version": 1, **environment(), "rates": figures, "steps": steps})


if __name__ == "__main__":
    main()
