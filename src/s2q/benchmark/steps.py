"""One denoising step of a published transformer, from its blocks with random weights.

    step = calls · Σ over block lists (blocks · time of one block)

A full-precision block and one packed block for each recipe run in the same rounds on the same fresh inputs. What lies
outside the blocks (embeddings, the last projection, the scheduler) is left out; it is below a hundredth of the work at
the published sizes.

`bound_ratio`: the same sum with the measured time of each linear of the baseline (the faster of bf16 and, on a CPU,
fp32) replaced by that of the plain int8 product of its shape; attention, norms and the rest are unchanged.

Legend: `M` rows, `K` in features, `N` out features.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from s2q.benchmark.breakdown import breakdown, in_milliseconds
from s2q.benchmark.case import Case, Entry, Settings
from s2q.benchmark.machine import full_precision, has_int8_gemm, int8_gemm, peak_memory, quantized_dtype
from s2q.benchmark.micro import baseline_of, times_of
from s2q.benchmark.results import identity
from s2q.benchmark.synthetic_blocks import block_grid, block_inputs, random_packed_linear, synthetic_block
from s2q.benchmark.timing import Timing, interleave, measures_of, stopwatch_for
from s2q.common.components import TRANSFORMERS
from s2q.common.seeds import derive_seed
from s2q.core.tokens import TokenGrid, token_grid
from s2q.models import BlockLinear, linears_of_block
from s2q.models.attention import attention_of
from s2q.models.synthetic import BlockList, SyntheticModel
from s2q.planning import plan_transformers, tensor_sizes
from s2q.planning.resolve import LinearPlan, recipe_linears, resolve

CPU_TOKENS = 1024
"""Video tokens of a block on a CPU, unless told otherwise."""

_BF16, _FP32 = "bf16", "fp32"
_OP = "denoising_step"

Plans = Mapping[str, Sequence[LinearPlan]]
"""The planned linears of each recipe, by its name."""


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

    def measure(missing: Sequence[Entry]) -> list[Entry]:
        names = {entry["recipe"] for entry in missing}
        recipes = [recipe for recipe in settings.recipes if recipe.name in names]
        transformers = {TRANSFORMERS[0]: model.meta_transformer()}
        sizes = tensor_sizes(transformers, torch.bfloat16)
        plans: dict[str, Sequence[LinearPlan]] = {}
        storage = {}
        for recipe in recipes:
            linears = resolve(recipe, recipe_linears(recipe, transformers), frames=model.frames)
            planned = plan_transformers(
                transformers, recipe, linears, model=model.label, sizes=sizes, dtype=torch.bfloat16
            )
            plans[recipe.name], storage[recipe.name] = linears, planned.storage
        measured = [_measure_list(model, block_list, plans, settings) for block_list in model.block_lists]
        return [
            entry | _step(model, measured, entry["recipe"], settings, storage=storage[entry["recipe"]])
            for entry in missing
        ]

    return Case(label=f"{_OP} {model.name}, {tokens} tokens", wanted=wanted, measure=measure)


class _ListResult:
    """Measurements of the blocks of one list; contenders are full precision and names of recipes."""

    def __init__(self, block_list: BlockList, timings: Mapping[str, Timing], built: int) -> None:
        self.block_list, self.built = block_list, built
        self._timings = timings
        self.shares: dict[str, dict[str, float]] = {}
        self.peaks: dict[str, int | None] = {}
        self.saved: dict[str, float | None] = {}
        self.baseline = baseline_of(timings, [name for name in (_BF16, _FP32) if name in timings])

    def samples(self, name: str) -> list[float]:
        """Milliseconds of all blocks of the list, by round."""
        return [value * self.block_list.count / self.built for value in self._timings[name].samples]


@torch.no_grad()
def _measure_list(model: SyntheticModel, block_list: BlockList, plans: Plans, settings: Settings) -> _ListResult:
    generator = torch.Generator(settings.device)
    generator.manual_seed(derive_seed(0, _OP, model.name, block_list.name))
    result = _compete(model, block_list, plans, generator, settings)
    result.saved = {  # when the blocks are gone from memory
        name: _saved_by_int8(model, block_list, generator, settings, dtype)
        for name, dtype in full_precision(settings.device).items()
        if name == result.baseline
    }
    return result


def _compete(
    model: SyntheticModel, block_list: BlockList, plans: Plans, generator: torch.Generator, settings: Settings
) -> _ListResult:
    tokens, device = synthetic_tokens(model, settings), settings.device
    built = min(settings.blocks, block_list.count)
    full = full_precision(device)
    dtypes = full | {name: quantized_dtype(device) for name in plans}
    stacks = {
        name: _stack(model, block_list, plans.get(name), built, generator, dtype) for name, dtype in dtypes.items()
    }

    def fresh(_round: int) -> dict[torch.dtype, dict[str, Any]]:
        drawn = block_inputs(model, block_list, tokens=tokens, generator=generator)
        return {dtype: {name: _cast(value, dtype) for name, value in drawn.items()} for dtype in set(dtypes.values())}

    grid = block_grid(model, tokens=tokens)
    attention = {name: None if name in full else settings.attention for name in stacks}
    runs = {
        name: (lambda data, name=name: _run(stacks[name], data[dtypes[name]], attention[name], grid)) for name in stacks
    }
    measures = measures_of(runs, stopwatch_for(device), options=settings.options)
    result = _ListResult(block_list, interleave(measures, fresh=fresh, options=settings.options), built)
    data = fresh(-1)
    for name, run in runs.items():
        result.peaks[name] = peak_memory(lambda run=run: run(data), device)
        result.shares[name] = breakdown(lambda run=run: run(data), nn.ModuleList(stacks[name]), device=device)
    return result


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value


def _stack(
    model: SyntheticModel,
    block_list: BlockList,
    linears: Sequence[LinearPlan] | None,
    count: int,
    generator: torch.Generator,
    dtype: torch.dtype,
) -> list[nn.Module]:
    if linears is None:
        return [synthetic_block(model, block_list, generator=generator, dtype=dtype) for _ in range(count)]
    plans = {linear.name: linear for linear in linears}

    def packed(place: int) -> nn.Module:
        def linear_of(linear: BlockLinear) -> nn.Module | None:
            name = f"{block_list.name}.{place}.{linear.inner_name}"
            return random_packed_linear(plans[name], generator=generator, dtype=dtype) if name in plans else None

        return synthetic_block(model, block_list, generator=generator, dtype=dtype, linear_of=linear_of)

    return [packed(place) for place in range(count)]


def _run(stack: Sequence[nn.Module], inputs: Mapping[str, Any], attention: str | None, grid: TokenGrid) -> object:
    """Run blocks one after the other, each on the streams that the one before returned."""
    arguments = dict(inputs)
    with attention_of(attention), token_grid(grid):
        for block in stack:
            output = block(**arguments)
            streams = output if isinstance(output, tuple) else (output,)
            arguments |= dict(zip(("hidden_states", "encoder_hidden_states"), streams, strict=False))
    return arguments


def _saved_by_int8(
    model: SyntheticModel, block_list: BlockList, generator: torch.Generator, settings: Settings, dtype: torch.dtype
) -> float | None:
    """Milliseconds that int8 products would save in one block of a dtype; None where the machine has no fast one."""
    if not has_int8_gemm(settings.device):
        return None
    tokens, counts = synthetic_tokens(model, settings), dict[tuple[int, int, int], int]()
    block = getattr(model.meta_transformer(blocks=1), block_list.name)[0]
    for linear in linears_of_block(block, "block", model.family):
        if linear.role == "linear":
            rows = model.batch * model.rows(block_list, linear.inner_name, tokens=tokens)
            shape = (rows, linear.in_features, linear.out_features)
            counts[shape] = counts.get(shape, 0) + 1
    saved = 0.0
    for shape, count in counts.items():
        times = _product_times(shape, generator, settings, dtype)
        saved += count * (times["full"].milliseconds - times["int8"].milliseconds)
    return saved


def _product_times(
    shape: tuple[int, int, int], generator: torch.Generator, settings: Settings, dtype: torch.dtype
) -> dict[str, Timing]:
    rows, in_features, out_features = shape
    device = generator.device
    weight = torch.randn(out_features, in_features, dtype=dtype, device=device, generator=generator)
    codes = torch.randint(-8, 8, weight.shape, dtype=torch.int8, device=device, generator=generator)
    gemm = int8_gemm(codes, rows)

    def fresh(_round: int) -> tuple[Any, Any]:
        x = torch.randn(rows, in_features, dtype=dtype, device=device, generator=generator)
        return x, torch.randint(-128, 128, x.shape, dtype=torch.int8, device=device, generator=generator)

    runs = {"full": lambda data: F.linear(data[0], weight), "int8": lambda data: gemm(data[1])}
    measures = measures_of(runs, stopwatch_for(device), options=settings.options)
    return interleave(measures, fresh=fresh, options=settings.options)


def _step(
    model: SyntheticModel,
    measured: Sequence[_ListResult],
    name: str,
    settings: Settings,
    *,
    storage: Mapping[str, int | float],
) -> Entry:
    full = {kind: _whole(model, measured, kind) for kind in full_precision(settings.device)}
    baseline, bound = baseline_of(full, list(full)), None
    saved = [result.saved.get(baseline) for result in measured]
    if None not in saved:
        lists = zip(measured, saved, strict=True)
        gain = sum(model.calls * result.block_list.count * (part or 0.0) for result, part in lists)
        bound = full[baseline].milliseconds / max(full[baseline].milliseconds - gain, 1e-9)
    return {
        **times_of(_whole(model, measured, name), full),
        "bound_ratio": bound,
        "breakdown": _breakdown(model, measured, name),
        "bf16_breakdown": _breakdown(model, measured, _BF16),
        "peak_memory_bytes": _peak(measured, name, storage["quantized_bytes"]),
        "bf16_peak_memory_bytes": _peak(measured, _BF16, storage["full_precision_bytes"]),
        "storage_bytes": storage["quantized_bytes"],
        "bf16_storage_bytes": storage["full_precision_bytes"],
        "text_tokens": model.text_tokens,
        "batch": model.batch,
    }


def _whole(model: SyntheticModel, measured: Sequence[_ListResult], name: str) -> Timing:
    """The step's time by round; lists were measured one after the other, in equally many rounds or fewer."""
    by_list = [result.samples(name) for result in measured]
    return Timing(samples=tuple(model.calls * sum(values) for values in zip(*by_list, strict=False)))


def _breakdown(model: SyntheticModel, measured: Sequence[_ListResult], name: str) -> dict[str, float]:
    """The parts of the step's time, in milliseconds; their sum is the step's time."""
    whole = _whole(model, measured, name).milliseconds
    weights = [Timing(samples=tuple(result.samples(name))).milliseconds for result in measured]
    sums: dict[str, float] = {}
    for result, weight in zip(measured, weights, strict=True):
        for category, value in in_milliseconds(result.shares[name], whole * weight / sum(weights)).items():
            sums[category] = sums.get(category, 0.0) + value
    return sums


def _peak(measured: Sequence[_ListResult], name: str, storage: int) -> int | None:
    """The whole transformer's weights and the largest memory that running a block adds."""
    peaks = [result.peaks[name] for result in measured]
    known = [peak for peak in peaks if peak is not None]
    return storage + max(known) if len(known) == len(peaks) else None
