"""One denoising step of a published transformer, from its blocks with random weights.

    step = calls · Σ over block lists (blocks · time of one block)

A full-precision block and one packed block for each recipe run in the same rounds on the same fresh inputs. What lies
outside the blocks (embeddings, the last projection, the scheduler) is left out; it is below a hundredth of the work at
the published sizes.

`bound_ratio`: the same sum with the measured time of each linear of the baseline (the faster of bf16 and, on a CPU,
fp32) replaced by that of the plain int8 product of its shape; attention, norms and the rest are unchanged.

Legend: `M` rows, `K` in features, `N` out features.
"""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from s2q.benchmark.breakdown import breakdown
from s2q.benchmark.case import Case, Entry, Settings
from s2q.benchmark.machine import full_precision, has_int8_gemm, peak_memory, quantized_dtype
from s2q.benchmark.micro import BF16, INT8, fastest, full_linear, int8_product, result_of, round_data, runs_of
from s2q.benchmark.results import identity
from s2q.benchmark.synthetic_blocks import block_grid, block_inputs, random_packed_linear, synthetic_block
from s2q.benchmark.timing import Timing, compete
from s2q.common.components import TRANSFORMERS
from s2q.common.seeds import derive_seed
from s2q.core.tokens import TokenGrid, token_grid
from s2q.models import BlockLinear, linears_of_block
from s2q.models.attention import attention_of
from s2q.models.synthetic import BlockList, SyntheticModel
from s2q.nn import quantize_attention
from s2q.planning import plan_transformers, tensor_sizes
from s2q.planning.resolve import LinearPlan, quantized_attention, recipe_linears, resolve

CPU_TOKENS = 1024
"""Video tokens of a block on a CPU, unless told otherwise."""

_OP = "denoising_step"


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """Linears and attention modules (by name) that a recipe quantizes; none in full precision."""

    linears: Sequence[LinearPlan] = ()
    attention: Sequence[str] = ()


Plans = Mapping[str, Quantized]
"""Quantized parts by the name of a recipe."""


def synthetic_tokens(model: SyntheticModel, settings: Settings) -> int:
    """Return the video tokens that a model is measured at: its own on a GPU, fewer on a CPU."""
    if settings.tokens is not None:
        return settings.tokens
    return min(CPU_TOKENS, model.tokens) if settings.device == "cpu" else model.tokens


def synthetic_step_case(model: SyntheticModel, settings: Settings) -> Case:
    """Make the case of `denoising_step` on a synthetic model; it has a result for each recipe."""
    tokens = synthetic_tokens(model, settings)
    wanted = tuple(
        identity(
            op=_OP,
            scheme=recipe.linear_scheme().name,
            recipe=recipe.name,
            backend="auto",
            model=model.label,
            tokens=tokens,
            blocks=settings.blocks,
            attention=settings.attention,
        )
        for recipe in settings.recipes
        if "auto" in settings.backends
    )

    measure = functools.partial(_measure, model, settings)
    return Case(label=f"{_OP} {model.name}, {tokens} tokens", wanted=wanted, measure=measure)


def _measure(model: SyntheticModel, settings: Settings, missing: Sequence[Entry]) -> list[Entry]:
    names = {entry["recipe"] for entry in missing}
    transformers = {TRANSFORMERS[0]: model.meta_transformer()}
    sizes = tensor_sizes(transformers, torch.bfloat16)
    plans: dict[str, Quantized] = {}
    storage: dict[str, int] = {}
    for recipe in settings.recipes:
        if recipe.name in names:
            linears = resolve(recipe, recipe_linears(recipe, transformers), frames=model.frames)
            planned = plan_transformers(
                transformers, recipe, linears, model=model.label, sizes=sizes, dtype=torch.bfloat16
            )
            attention = quantized_attention(recipe, transformers)
            plans[recipe.name] = Quantized(linears=linears, attention=attention)
            storage[recipe.name] = planned.storage["quantized_bytes"]
            storage[BF16] = planned.storage["full_precision_bytes"]
    measured = [_measure_list(model, block_list, plans, settings) for block_list in model.block_lists]
    whole = {name: _whole(measured, name) for name in measured[0].milliseconds}
    parts = {name: _parts(measured, name, whole[name], size) for name, size in storage.items()}
    full = {name: whole[name] for name in full_precision(settings.device)}
    baseline = fastest(full)
    saved = [result.saved.get(baseline) for result in measured]
    bound = None
    if None not in saved:
        bound = full[baseline].milliseconds / max(full[baseline].milliseconds - sum(saved), 1e-9)
    return [
        result_of(entry, whole[entry["recipe"]], full, parts[entry["recipe"]], parts[BF16])
        | {"bound_ratio": bound, "text_tokens": model.text_tokens, "batch": model.batch}
        for entry in missing
    ]


@dataclass(frozen=True, kw_only=True)
class _ListResult:
    """Measurements of the blocks of one list, by contender: full precision or the name of a recipe.

    Attributes:
        milliseconds: All blocks of the list in a denoising step, by round.
        saved: Milliseconds of a denoising step that int8 products would save the faster full precision.
    """

    milliseconds: Mapping[str, Timing]
    shares: Mapping[str, Mapping[str, float]]
    peaks: Mapping[str, int | None]
    saved: Mapping[str, float | None]


@torch.no_grad()
def _measure_list(model: SyntheticModel, block_list: BlockList, plans: Plans, settings: Settings) -> _ListResult:
    generator = torch.Generator(settings.device)
    generator.manual_seed(derive_seed(0, _OP, model.name, block_list.name))
    timings, shares, peaks = _compete(model, block_list, plans, generator, settings)
    full = full_precision(settings.device)
    baseline = fastest({name: timings[name] for name in full})
    saved = _saved_by_int8(model, block_list, generator, settings, full[baseline])  # blocks are gone from memory
    return _ListResult(
        milliseconds=timings,
        shares=shares,
        peaks=peaks,
        saved={baseline: None if saved is None else model.calls * block_list.count * saved},
    )


def _compete(
    model: SyntheticModel, block_list: BlockList, plans: Plans, generator: torch.Generator, settings: Settings
) -> tuple[dict[str, Timing], dict[str, dict[str, float]], dict[str, int | None]]:
    """By contender, the time of all blocks of the list in a step, and shares and peak memory of a call of a few."""
    tokens, device = synthetic_tokens(model, settings), settings.device
    built = min(settings.blocks, block_list.count)
    full = full_precision(device)
    dtypes = full | {name: quantized_dtype(device) for name in plans}
    stacks = {
        name: _stack(model, block_list, plans.get(name, Quantized()), built, generator, dtype)
        for name, dtype in dtypes.items()
    }

    def fresh(_round: int) -> dict[torch.dtype, dict[str, Any]]:
        drawn = block_inputs(model, block_list, tokens=tokens, generator=generator)
        return {dtype: {name: _cast(value, dtype) for name, value in drawn.items()} for dtype in set(dtypes.values())}

    grid = block_grid(model, tokens=tokens)
    attention = {name: None if name in full else settings.attention for name in stacks}
    streams = model.family.streams_of(block_list.name)
    runs = {
        name: (lambda data, name=name: _run(stacks[name], streams, data[dtypes[name]], attention[name], grid))
        for name in stacks
    }
    timings = compete(runs, fresh=fresh, device=device, options=settings.options)
    timings = {name: timing.times(model.calls * block_list.count / built) for name, timing in timings.items()}
    shares, peaks, data = {}, {}, fresh(-1)
    for name, run in runs.items():
        call = functools.partial(run, data)
        peaks[name] = peak_memory(call, device)
        shares[name] = breakdown(call, nn.ModuleList(stacks[name]), device=device)
    return timings, shares, peaks


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value


def _stack(
    model: SyntheticModel,
    block_list: BlockList,
    quantized: Quantized,
    count: int,
    generator: torch.Generator,
    dtype: torch.dtype,
) -> list[nn.Module]:
    plans = {linear.name: linear for linear in quantized.linears}

    def packed(place: int, linear: BlockLinear) -> nn.Module | None:
        plan = plans.get(f"{block_list.name}.{place}.{linear.inner_name}")
        return None if plan is None else random_packed_linear(plan, generator=generator, dtype=dtype)

    makers = [functools.partial(packed, place) for place in range(count)]
    blocks = [synthetic_block(model, block_list, generator=generator, dtype=dtype, linear_of=make) for make in makers]
    for place, block in enumerate(blocks):
        if f"{block_list.name}.{place}.{model.family.attention}" in quantized.attention:
            quantize_attention(block, [model.family.attention])
    return blocks


def _run(
    stack: Sequence[nn.Module],
    streams: Sequence[str],
    inputs: Mapping[str, Any],
    attention: str | None,
    grid: TokenGrid,
) -> object:
    """Run blocks one after the other, each on the streams, by argument, that the one before returned."""
    arguments = dict(inputs)
    with attention_of(attention), token_grid(grid):
        for block in stack:
            output = block(**arguments)
            outputs = output if isinstance(output, tuple) else (output,)
            arguments |= dict(zip(streams, outputs, strict=True))
    return arguments


def _saved_by_int8(
    model: SyntheticModel, block_list: BlockList, generator: torch.Generator, settings: Settings, dtype: torch.dtype
) -> float | None:
    """Milliseconds that int8 products would save in one block of a dtype; None where the machine has no fast one."""
    if not has_int8_gemm(settings.device):
        return None
    tokens, counts = synthetic_tokens(model, settings), Counter[tuple[int, int, int]]()
    block = getattr(model.meta_transformer(blocks=1), block_list.name)[0]
    for linear in linears_of_block(block, "block", model.family):
        if linear.role == "linear":
            rows = model.batch * model.rows(block_list, linear.inner_name, tokens=tokens)
            counts[rows, linear.in_features, linear.out_features] += 1
    saved = 0.0
    for shape, count in counts.items():
        rows, in_features, out_features = shape
        products = {
            BF16: full_linear(in_features, out_features, generator, dtype),
            INT8: int8_product(shape, generator),
        }
        fresh = round_data(products, rows, in_features, generator)
        times = compete(runs_of(products), fresh=fresh, device=settings.device, options=settings.options)
        saved += count * (times[BF16].milliseconds - times[INT8].milliseconds)
    return saved


def _whole(measured: Sequence[_ListResult], name: str) -> Timing:
    """The step's time by round; lists were measured one after the other, in equally many rounds or fewer."""
    by_list = [result.milliseconds[name].samples for result in measured]
    return Timing(samples=tuple(map(sum, zip(*by_list, strict=False))))


def _parts(measured: Sequence[_ListResult], name: str, whole: Timing, storage: int) -> Entry:
    """The parts of the step's time in milliseconds, whose sum is that time, and its memory.

    The peak is the whole transformer's weights and the largest memory that running a block adds.
    """
    weights = [result.milliseconds[name].milliseconds for result in measured]
    parts: Counter[str] = Counter()
    for result, weight in zip(measured, weights, strict=True):
        part = whole.milliseconds * weight / sum(weights)
        parts.update({category: share * part for category, share in result.shares[name].items()})
    peaks = [result.peaks[name] for result in measured]
    peak = None if None in peaks else storage + max(peaks)
    return {"breakdown": dict(parts), "peak_memory_bytes": peak, "storage_bytes": storage}
