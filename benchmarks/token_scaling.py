"""How the cost of calibrating a block grows with its tokens: one step of distillation and one of GPTQ's Hessian.

    python benchmarks/token_scaling.py [--tokens 1024] [--repeats 5]

The same block of CogVideoX at N and at 2N tokens, taken in turn in one process on random inputs; the profiler's self
times are summed over attention (scaled dot product, forward and backward) and over everything else. The ratio of the
second must not be above 2; that of attention may be 4. Written to ``benchmarks/results/token-scaling.json``.
"""

import argparse
import statistics
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from environment import environment
from records import write_record

from s2q.benchmark.calibration_block import first_block, first_optimization, first_student, synthetic_subject
from s2q.benchmark.synthetic_blocks import synthetic_block
from s2q.models.synthetic import synthetic_model
from s2q.ops.attention_colsum import attention_colsum
from s2q.recipes.load import load_recipe
from s2q.rounding import HessianAccumulator

WIDTH, HEADS = 384, 6
TEXT = 32
RECIPE = "s2q-w4a4"
RESULT = Path(__file__).parent / "results" / "token-scaling.json"


def hessian(hidden: torch.Tensor) -> None:
    """The Hessian of one input."""
    HessianAccumulator(WIDTH).add(hidden)


def importance(hidden: torch.Tensor) -> None:
    """Column sums of attention; quadratic, as attention is."""
    heads = hidden.reshape(1, -1, HEADS, WIDTH // HEADS).transpose(1, 2)
    attention_colsum(heads, heads)


def microseconds(work) -> dict[str, float]:  # noqa: ANN001
    """Self time of one call, that of attention and that of the rest."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    sums = {"attention": 0.0, "rest": 0.0}
    for event in profile.key_averages():
        kind = "attention" if "attention" in event.key or "flash" in event.key else "rest"
        sums[kind] += event.self_cpu_time_total
    return sums


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes, recipe = (arguments.tokens, 2 * arguments.tokens), load_recipe(RECIPE)
    model = synthetic_model("cogvideox-2b")
    config = dict(model.config) | {"num_attention_heads": HEADS, "attention_head_dim": WIDTH // HEADS}
    model, generator = replace(model, config=config, text_tokens=TEXT), torch.Generator().manual_seed(0)
    block = synthetic_block(model, model.block_lists[0], generator=generator, dtype=torch.float32)
    works: dict[str, list] = {"distillation step": [], "Hessian": [], "token importance": []}
    stack = ExitStack()
    for tokens in sizes:
        subject = synthetic_subject(
            model, model.block_lists[0], block, tokens=tokens, generator=generator, samples=arguments.repeats + 1
        )
        opened = stack.enter_context(first_block(subject, recipe, device="cpu"))
        optimization = first_optimization(first_student(opened), recipe)
        samples = opened.samples
        works["distillation step"].append(lambda at, o=optimization, s=samples: o.gradient(s[at]))
        works["Hessian"].append(lambda at, s=samples: hessian(s[at].inputs["hidden_states"]))
        works["token importance"].append(lambda at, s=samples: importance(s[at].inputs["hidden_states"]))
    ratios: dict[str, list[float]] = {}
    for repeat in range(arguments.repeats + 1):
        for name, pair in works.items():
            small, large = (microseconds(lambda work=work, at=repeat: work(at)) for work in pair)
            if repeat == 0:
                continue  # the first is a warm-up
            for kind in ("attention", "rest"):
                if name == "distillation step" or kind == "rest":
                    label = f"{name}, {kind}" if name == "distillation step" else name
                    ratios.setdefault(label, []).append(large[kind] / small[kind])
    stack.close()
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    content = {"tokens": sizes, "width": WIDTH, "ratio_of_doubling": medians, "samples": ratios, **environment()}
    write_record(RESULT, content)
    for name, value in medians.items():
        print(f"{name}: {value:.2f} times")


if __name__ == "__main__":
    main()
