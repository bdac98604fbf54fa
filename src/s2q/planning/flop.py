"""FLOP and bytes of each stage of a run, counted from dimensions alone.

A step of distillation takes the products of a forward pass three times (the gradient of inputs and of the quantized
weights), attention three and a half times (fused kernels compute the scores again), a checkpointed one another forward
pass. Around the products, quantization and transforms move every value and every weight of the linears a number of
times. What samples are carried through, observed, judged and rounded by are passes without gradients.

Not counted: text encoder, autoencoder, reading and writing of files.

Legend: `I/O` in/out features, `S` samples, `E` epochs, `r` rank, `n1`, `n2` orders of a rotation's factors.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from s2q.core.schemes import TABLES
from s2q.planning.cost import BlockShape, Figures, Workload
from s2q.recipes.schema import Recipe
from s2q.selection.known import known_samples, recorded_by_round

_FP32 = 4
_BACKWARD, _ATTENTION_BACKWARD = 2.0, 2.5
"""FLOP of a backward pass for each of the forward pass."""


@dataclass(frozen=True)
class _Pass(Figures):
    """Elementwise operations of a pass through a block, as counted (`benchmarks/step_counts.py`).

    Attributes:
        value: Bytes for each value of a linear's input or output, beside those in the dtype of calibration.
        typed: Values read or written in that dtype, likewise.
        weight: Bytes for each weight of a linear.
        launches: Operations for each linear.
    """

    value: float = 0.0
    typed: float = 0.0
    weight: float = 0.0
    launches: float = 0.0


_PLAIN = _Pass(typed=2.4, launches=7)
_STUDENT, _STUDENT_BRANCH = _Pass(value=15, typed=2.4, launches=27), _Pass(value=10.5, launches=9)
_STEP, _STEP_BRANCH = _Pass(value=36, typed=7, weight=82, launches=86), _Pass(value=12.5, weight=17, launches=31)
_COLUMN_LAUNCHES, _TABLE_LAUNCHES = 5, 40
"""Operations of GPTQ for each column of the weights that read an input; the second with tables in groups of 16."""
_TABLE_BYTES = 5900.0
"""Bytes that these move for each weight, most of them in the search."""
_EIGEN_FLOP = 9.0
"""FLOP of the eigenvectors of a symmetric matrix, for each I³."""
_FOLDING_PASSES = 30.0
"""Times that a weight is read or written in fp32 where it is only rounded."""

RATES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "bf16"}
"""The rate at which products of a dtype are computed, by name in `gpus.yaml`."""


@dataclass(frozen=True)
class Work:
    """Counted work.

    Attributes:
        products: FLOP of dense products by the name of their rate, "bf16".
        attention: FLOP of attention, likewise.
        traffic: Bytes that elementwise operations read and write.
        transfer: Bytes from the host to the device.
        launches: Operations.
    """

    products: Mapping[str, float] = field(default_factory=dict)
    attention: Mapping[str, float] = field(default_factory=dict)
    traffic: float = 0.0
    transfer: float = 0.0
    launches: float = 0.0

    @property
    def flop(self) -> float:
        """All FLOP."""
        return sum(self.products.values()) + sum(self.attention.values())

    def __add__(self, other: "Work") -> "Work":
        return Work(
            _sum(self.products, other.products),
            _sum(self.attention, other.attention),
            self.traffic + other.traffic,
            self.transfer + other.transfer,
            self.launches + other.launches,
        )

    def __mul__(self, times: float) -> "Work":
        return Work(
            {name: times * flop for name, flop in self.products.items()},
            {name: times * flop for name, flop in self.attention.items()},
            times * self.traffic,
            times * self.transfer,
            times * self.launches,
        )


def _sum(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    return {name: first.get(name, 0.0) + second.get(name, 0.0) for name in dict.fromkeys((*first, *second))}


def forward_work(shape: BlockShape, dtype: torch.dtype, *, quantized: bool = False) -> Work:
    """Count a pass of one sample through a block without gradients; with quantized linears, also what they add."""
    rate = RATES[dtype]
    flop = sum(2.0 * weight * rows for weight, (_, rows) in zip(shape.weights, shape.outputs, strict=True))
    counted = _PLAIN
    if quantized:
        counted = _STUDENT + _STUDENT_BRANCH if any(shape.ranks) else _STUDENT
        for (features, rows), orders, rank in zip(shape.inputs, shape.rotations, shape.ranks, strict=True):
            flop += 2.0 * features * rows * (orders + 2 * rank)
    attention = sum(4.0 * queries * keys * width for queries, keys, width in shape.attention)
    return Work({rate: flop}, {rate: attention}, *_moved(shape, counted, dtype))


def _moved(shape: BlockShape, counted: _Pass, dtype: torch.dtype) -> tuple[float, float, float]:
    """Traffic, no transfer, and launches of a pass."""
    values = sum(features * rows for features, rows in (*shape.inputs, *shape.outputs))
    traffic = values * (counted.value + counted.typed * dtype.itemsize) + counted.weight * sum(shape.weights)
    return traffic, 0.0, counted.launches * len(shape.weights)


def step_work(shape: BlockShape, dtype: torch.dtype, *, checkpointed: bool) -> Work:
    """Count a step of distillation or refinement on one sample."""
    forward = forward_work(shape, dtype, quantized=True)
    again = 1.0 if checkpointed else 0.0
    rate = RATES[dtype]
    orders = sum(shape.rotations) / max(1, len(shape.rotations))
    folding = 2.0 * orders * sum(shape.weights) * (1 + _BACKWARD)
    products = {rate: forward.products[rate] * (1 + _BACKWARD + again)}
    traffic, _, launches = _moved(shape, _STEP + _STEP_BRANCH if any(shape.ranks) else _STEP, dtype)
    return Work(
        _sum(products, {"fp32": folding}),
        {rate: forward.attention[rate] * (1 + _ATTENTION_BACKWARD + again)},
        traffic + again * forward.traffic,
        shape.sample_bytes(dtype.itemsize, target_itemsize=dtype.itemsize),
        launches + again * forward.launches,
    )


def block_work(
    shape: BlockShape,
    recipe: Recipe,
    *,
    workload: Workload,
    dtype: torch.dtype,
    samples: int,
    checkpointed: bool,
    epochs: Sequence[tuple[int, int]],
) -> Work:
    """Count the calibration of a block, without what finds its inputs (`reaching_work`).

    Args:
        dtype: That blocks are calibrated in.
        samples: S, calls of the block.
        epochs: Epochs of distillation and of refinement, each with the number of times that it looks at all samples.
    """
    plain = in_tf32(forward_work(shape, dtype))
    quantized = judging_work(shape, dtype)
    step = in_tf32(step_work(shape, dtype, checkpointed=checkpointed))
    sample = Work(transfer=shape.sample_bytes(dtype.itemsize, target_itemsize=dtype.itemsize))
    judged = 3 + sum(1 + looks for _, looks in epochs) + len(epochs)  # rounded to nearest, initial, final; and between
    total = (plain + sample) * samples + (quantized + sample) * (samples * judged)
    total += step * (samples * sum(count for count, _ in epochs))
    if recipe.loss.weighting == "attention":
        total += Work(attention=plain.attention, launches=2) * samples
    if recipe.rounding.needs_hessian:
        total += (plain + sample) * samples + _hessian_work(shape, samples) + _gptq_work(shape, recipe)
    if recipe.modulation_rounding.needs_hessian and shape.modulated:
        total += plain * workload.steps
    if recipe.transforms.low_rank:
        total += _basis_work(shape, samples)
    return total


def reaching_work(
    shapes: Sequence[BlockShape], dtype: torch.dtype, *, samples: int, chained: bool, paged_bytes: int = 0
) -> Work:
    """Count what finds the inputs of all blocks: a pass of each, or a pass from the first block to each.

    The latter copies to the device what it has of `paged_bytes`, those of all blocks.
    """
    passes = [1 if chained else len(shapes) - 1 - index for index in range(len(shapes))]
    works = (forward_work(shape, dtype) * (samples * count) for shape, count in zip(shapes, passes, strict=True))
    paged = 0 if chained else paged_bytes * samples * sum(passes) / len(shapes)
    return sum(works, start=Work(transfer=paged))


def judging_work(shape: BlockShape, dtype: torch.dtype) -> Work:
    """Count a pass of one sample through a block with quantized linears, in the dtype of calibration."""
    return in_tf32(forward_work(shape, dtype, quantized=True))


def in_tf32(work: Work) -> Work:
    """Return work whose fp32 products run in TF32, as blocks are observed and distilled on a GPU."""
    return replace(work, products={"tf32" if rate == "fp32" else rate: flop for rate, flop in work.products.items()})


def collecting_work(
    shapes: Sequence[BlockShape],
    recipe: Recipe,
    *,
    workload: Workload,
    dtype: torch.dtype,
    transformers: Sequence[str],
    quantized: Collection[str],
    paged_bytes: int = 0,
) -> Work:
    """Count the generation of candidates: each denoising step calls one of the transformers, for each branch or once.

    Samples are of the quantized ones. A call copies `paged_bytes` to the device.
    """
    once = sum((forward_work(shape, dtype) for shape in shapes), start=Work()) * (workload.branches / len(transformers))
    once += Work(transfer=paged_bytes * workload.branches / workload.rows)
    prompts, called = recipe.calibration.n_prompts, workload.calls_of(transformers)
    known = known_samples(recipe.calibration, called, prompts=prompts, seed=0)
    chosen = None if known is None else {name: known[name] for name in called if name in quantized}
    apart = recipe.calibration.trajectory_2 == "quantized" and len(quantized) > 1
    rounds = recorded_by_round(chosen, called, prompts=prompts, apart=apart)
    return once * sum(map(sum, rounds.values()))


def folding_work(weights: int, *, orders: int) -> Work:
    """Count rounding without samples: a rotation is folded in fp64 where there is one."""
    return Work({"fp64": 2.0 * orders * weights}, traffic=_FOLDING_PASSES * _FP32 * weights)


def _hessian_work(shape: BlockShape, samples: int) -> Work:
    flop = samples * sum(2.0 * rows * features**2 for features, rows in shape.inputs)
    return Work({"tf32": flop})


def _gptq_work(shape: BlockShape, recipe: Recipe) -> Work:
    """A factorization of the Hessian, fp64, for each input; then the columns of the weights that read it."""
    has_table = recipe.weights.levels in TABLES
    inputs = [features for features, _ in shape.inputs]
    rounded = (weight * (weight // outer) for weight, (outer, _) in zip(shape.weights, shape.outputs, strict=True))
    return Work(
        {"fp64": sum(4 / 3 * features**3 for features in inputs), "fp32": float(sum(rounded))},
        traffic=_TABLE_BYTES * sum(shape.weights) if has_table else 0.0,
        launches=(_TABLE_LAUNCHES if has_table else _COLUMN_LAUNCHES) * sum(inputs),
    )


def _basis_work(shape: BlockShape, samples: int) -> Work:
    return _hessian_work(shape, samples) + Work(
        {"fp64": sum(_EIGEN_FLOP * features**3 for features, _ in shape.inputs)}
    )
