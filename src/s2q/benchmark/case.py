"""A benchmark case: one unit of work that gives one or more results."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from s2q.benchmark.timing import TimingOptions
from s2q.common.errors import InvalidInputError
from s2q.nn.dequantized import FASTEST
from s2q.ops.dispatch import FP4
from s2q.recipes.schema import Recipe

OPS = ("linear", "activation_path", "gemm", "attention_colsum", "int8_attention", "denoising_step", "calibration_block")
"""The ops of the benchmark, in execution order."""

BACKENDS = ("auto", "reference", "cpu", "triton", FASTEST, FP4)

Entry = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings shared by all measurements of a run.

    Attributes:
        backends: Those of `BACKENDS` to measure.
        tokens: Rows of an op, video tokens of a block; None for a default.
        blocks: Blocks of each list to time in a denoising step.
        attention: Attention backend of the quantized contenders of a denoising step, as diffusers names it; the bf16
            one keeps PyTorch's own. None is PyTorch's own for all.
        generation: Settings of the videos of a pipeline.
    """

    device: str
    backends: tuple[str, ...]
    recipes: tuple[Recipe, ...]
    options: TimingOptions
    tokens: int | None
    blocks: int
    attention: str | None
    generation: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One unit of work; `measure` takes the identities of results, all of `wanted` or some."""

    label: str
    wanted: tuple[Entry, ...]
    measure: Callable[[Sequence[Entry]], list[Entry]]


def check_recipes(recipes: Sequence[Recipe]) -> None:
    """Refuse two recipes of one name: their results could not be told apart."""
    names = [recipe.name for recipe in recipes]
    for name in names:
        if names.count(name) > 1:
            raise InvalidInputError(f"recipe {name} appears twice; pass it once")
