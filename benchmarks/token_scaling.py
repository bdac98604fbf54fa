"""How the cost of calibrating a block grows with its tokens: one step of distillation and one of GPTQ's Hessian.

    python benchmarks/token_scaling.py [--tokens 1024] [--repeats 5]

The same block of CogVideoX at N and at 2N tokens, taken in turn in one process on random inputs; the profiler's self
times are summed over attention (scaled dot product, forward and backward) and over everything else. The ratio of the
second must not be above 2; that of attention may be 4. Written to ``benchmarks/results/token-scaling.json``.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from environment import environment
from torch import nn

from s2q.core.schemes import LinearScheme, PerChannel, PerToken, QuantScheme
from s2q.distillation.loss import weighted_token_loss
from s2q.nn import LearnableClip, StudentInput, StudentLinear, replace_module
from s2q.ops.attention_colsum import attention_colsum
from s2q.rounding import HessianAccumulator
from s2q.transforms import Compose, KroneckerTransform, SmoothScale

WIDTH, HEADS = 384, 6
TEXT = 32
LINEARS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
RESULT = Path(__file__).parent / "results" / "token-scaling.json"


def student_of(block: nn.Module) -> nn.Module:
    """Put learnable students in place of the block's linears, as a run does."""
    activation = QuantScheme(num_bits=4, granularity=PerToken(), dynamic=True)
    scheme = LinearScheme(weight=QuantScheme(num_bits=4, granularity=PerChannel()), activation=activation)
    for name in LINEARS:
        linear = block.get_submodule(name)
        features = linear.in_features
        transform = Compose(SmoothScale(torch.ones(features)), KroneckerTransform.build(features))
        source = StudentInput(activation, transform=transform, clip=LearnableClip((1,)))
        replace_module(block, name, StudentLinear.with_clip(linear, scheme=scheme, source=source))
    return block


def inputs_of(tokens: int, seed: int) -> dict[str, torch.Tensor]:
    """Random inputs of a block with that many video tokens."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(1, tokens, WIDTH, generator=generator),
        "encoder_hidden_states": torch.randn(1, TEXT, WIDTH, generator=generator),
        "temb": torch.randn(1, WIDTH, generator=generator),
    }


def step(block: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """One step of distillation without the optimiser, whose work does not depend on tokens."""
    targets = (torch.zeros_like(inputs["hidden_states"]), torch.zeros_like(inputs["encoder_hidden_states"]))
    weighted_token_loss(block(**inputs), targets).backward()


def hessian(inputs: dict[str, torch.Tensor]) -> None:
    """The Hessian of one input."""
    HessianAccumulator(WIDTH).add(inputs["hidden_states"])


def importance(inputs: dict[str, torch.Tensor]) -> None:
    """Column sums of attention; quadratic, as attention is."""
    heads = inputs["hidden_states"].reshape(1, -1, HEADS, WIDTH // HEADS).transpose(1, 2)
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
    block = CogVideoXBlock(
        dim=WIDTH, num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, time_embed_dim=WIDTH
    )
    student = student_of(block.requires_grad_(False))
    sizes = (arguments.tokens, 2 * arguments.tokens)
    works = {
        "distillation step": lambda own: microseconds(lambda: step(student, own)),
        "Hessian": lambda own: microseconds(lambda: hessian(own)),
        "token importance": lambda own: microseconds(lambda: importance(own)),
    }
    ratios: dict[str, list[float]] = {}
    for repeat in range(arguments.repeats + 1):
        inputs = [inputs_of(tokens, repeat) for tokens in sizes]
        for name, work in works.items():
            small, large = (work(own) for own in inputs)
            if repeat == 0:
                continue  # the first is a warm-up
            for kind in ("attention", "rest"):
                if name == "distillation step" or kind == "rest":
                    label = f"{name}, {kind}" if name == "distillation step" else name
                    ratios.setdefault(label, []).append(large[kind] / small[kind])
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    content = {"tokens": sizes, "width": WIDTH, "ratio_of_doubling": medians, "samples": ratios, **environment()}
    RESULT.write_text(json.dumps(content, indent=1) + "\n")
    for name, value in medians.items():
        print(f"{name}: {value:.2f} times")


if __name__ == "__main__":
    main()
