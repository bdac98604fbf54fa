"""Single operations on the shapes of published layers, each against full precision in the same rounds.

| op | measured | against |
|---|---|---|
| `linear` | a packed linear as a model runs it; three that share an input (q, k, v) | as many `F.linear` |
| `activation_path` | transform and quantization of its input | the same `F.linear`: what it adds to the layer |
| `gemm` | packed weight, integer product, scales, bias | the same `F.linear` |
| `attention_colsum` | column sums of attention | bf16 scaled dot product attention |

`F.linear` runs in bf16, on a CPU in fp32 too; the faster is the baseline. Quantized layers run in bf16, or in fp32 on a
CPU that emulates it. `bound_ratio` of `linear` and `gemm`: the baseline over the plain int8 product of the same shape.

Legend: `M` rows, `K` in features, `N` out features; `H` heads, `D` head dim.
"""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2q.benchmark.case import Case, Entry, Settings
from s2q.benchmark.machine import full_precision, has_int8_gemm, int8_gemm, peak_memory, quantized_dtype
from s2q.benchmark.results import identity
from s2q.benchmark.shapes import AttentionShape, LayerShape
from s2q.benchmark.synthetic_blocks import random_packed_linear
from s2q.benchmark.timing import Run, Timing, interleave, measures_of, stopwatch_for
from s2q.common.seeds import derive_seed
from s2q.models.family import BlockLinear
from s2q.nn import PackedLinear, set_backend, share_inputs
from s2q.ops import activation_path, attention_colsum, rescaled_int_matmul
from s2q.ops.dispatch import resolve_backend
from s2q.planning.resolve import resolve
from s2q.recipes.schema import Recipe

_BF16, _INT8 = "bf16", "int8"

_TABLES: Mapping[str, Mapping[str, Any]] = {
    "linear": rescaled_int_matmul.BACKENDS,
    "activation_path": activation_path.BACKENDS,
    "gemm": rescaled_int_matmul.BACKENDS,
    "attention_colsum": attention_colsum.BACKENDS,
}
"""The backends of what is measured; a packed linear has those of the product."""


@dataclass(frozen=True, kw_only=True)
class _Contender:
    """One way to compute an op; `reads` is the dtype of its x, or the width of the codes that it reads in its place."""

    run: Run
    storage_bytes: int
    reads: torch.dtype | int = torch.bfloat16


def resolved(op: str, entry: Mapping[str, Any], device: str) -> str:
    """Return the backend that ran where "auto" was asked for."""
    probe = torch.empty(0, dtype=torch.bfloat16, device=device)
    return resolve_backend(entry["backend"], probe, _TABLES[op])


def chosen_backends(op: str, settings: Settings) -> list[str]:
    """Return those backends of an op that were asked for."""
    return [name for name in ("auto", *_TABLES[op]) if name in settings.backends]


def linear_cases(op: str, shapes: Sequence[LayerShape], settings: Settings) -> list[Case]:
    """Make the cases of `linear`, `activation_path` or `gemm`: one a shape, and one for each q, k and v together."""
    backends = chosen_backends(op, settings)
    recipes = [recipe for recipe in settings.recipes if _applies(op, recipe)]
    cases = []
    alone = [(shape, 1) for shape in shapes]
    shared = [shape for shape in shapes if op == "linear" and any(name.endswith("to_k") for name in shape.layers)]
    for shape, readers in (*alone, *((shape, 3) for shape in shared)):
        wanted = tuple(
            identity(
                op=op,
                scheme=recipe.linear_scheme().name,
                recipe=recipe.name,
                backend=backend,
                shape=list(shape.shape),
                readers=readers if readers > 1 else None,
            )
            for recipe in recipes
            for backend in backends
        )

        def measure(missing: Sequence[Entry], shape: LayerShape = shape) -> list[Entry]:
            return _measure_linear(op, shape, missing, settings)

        label = f"{op} {' × '.join(map(str, shape.shape))}" + (f", {readers} together" if readers > 1 else "")
        cases.append(Case(label=label, wanted=wanted, measure=measure))
    return cases


def attention_cases(shapes: Sequence[AttentionShape], settings: Settings) -> list[Case]:
    """Make the cases of `attention_colsum`, one a shape."""
    backends = chosen_backends("attention_colsum", settings)
    cases = []
    for shape in shapes:
        full = [shape.tokens, shape.heads * shape.head_dim, shape.tokens]
        wanted = tuple(
            identity(op="attention_colsum", scheme=_BF16, backend=backend, shape=full) for backend in backends
        )

        def measure(missing: Sequence[Entry], shape: AttentionShape = shape) -> list[Entry]:
            return _measure_attention(shape, missing, settings)

        cases.append(Case(label=f"attention_colsum {shape.tokens} × {full[1]}", wanted=wanted, measure=measure))
    return cases


def _measure_linear(op: str, shape: LayerShape, missing: Sequence[Entry], settings: Settings) -> list[Entry]:
    rows, in_features, out_features = shape.shape
    linear = BlockLinear(
        name="layer",
        inner_name="layer",
        block=0,
        role="linear",
        in_features=in_features,
        out_features=out_features,
        has_bias=True,
    )
    readers = missing[0]["readers"] or 1
    generator = torch.Generator(settings.device).manual_seed(derive_seed(0, op, *shape.shape))
    contenders: dict[str, _Contender] = {
        name: _together(_full_linear, readers, in_features, out_features, generator, dtype)
        for name, dtype in full_precision(settings.device).items()
    }
    full = list(contenders)
    if op != "activation_path" and has_int8_gemm(settings.device):
        contenders[_INT8] = _together(_int8_product, readers, shape.shape, generator)
    packed = {
        recipe.name: nn.ModuleList(_packed(linear, recipe, generator) for _ in range(readers))
        for recipe in settings.recipes
    }
    for entry in missing:
        layers = copy.deepcopy(packed[entry["recipe"]])
        share_inputs(layers)
        contenders[_name_of(entry)] = _MAKERS[op](layers, entry["backend"], rows, generator)

    kinds = {contender.reads for contender in contenders.values()}

    def fresh(_round: int) -> dict[Any, Tensor]:
        x = torch.randn(rows, in_features, dtype=torch.bfloat16, device=settings.device, generator=generator)
        codes = {bits: _random_codes((rows, in_features), bits, generator) for bits in kinds if isinstance(bits, int)}
        return codes | {dtype: x.to(dtype) for dtype in kinds if isinstance(dtype, torch.dtype)}

    timings, peaks = _compete(contenders, fresh, settings)
    bound = timings[_INT8].faster_than(timings[baseline_of(timings, full)]) if _INT8 in timings else None
    return [
        _entry(entry, contenders, timings, peaks, full=full)
        | {"bound_ratio": bound, "layers": list(shape.layers), "ran": resolved(op, entry, settings.device)}
        for entry in missing
    ]


def _measure_attention(shape: AttentionShape, missing: Sequence[Entry], settings: Settings) -> list[Entry]:
    generator = torch.Generator(settings.device).manual_seed(derive_seed(0, "attention", shape.tokens))
    size = (3, 1, shape.heads, shape.tokens, shape.head_dim)

    def fresh(_round: int) -> dict[Any, Tensor]:
        return {torch.bfloat16: torch.randn(size, dtype=torch.bfloat16, device=settings.device, generator=generator)}

    contenders = {_BF16: _Contender(run=lambda qkv: F.scaled_dot_product_attention(*qkv), storage_bytes=0)}
    for entry in missing:
        contenders[_name_of(entry)] = _column_sums(entry["backend"])
    timings, peaks = _compete(contenders, fresh, settings)
    more = {"bound_ratio": None, "layers": [f"{model} attention" for model in shape.models], "heads": shape.heads}
    return [
        _entry(entry, contenders, timings, peaks, full=[_BF16])
        | more
        | {"ran": resolved("attention_colsum", entry, settings.device)}
        for entry in missing
    ]


@torch.no_grad()
def _compete(
    contenders: Mapping[str, _Contender], fresh: Callable[[int], Any], settings: Settings
) -> tuple[dict[str, Timing], dict[str, int | None]]:
    runs = {name: (lambda data, way=contender: way.run(data[way.reads])) for name, contender in contenders.items()}
    measures = measures_of(runs, stopwatch_for(settings.device), options=settings.options)
    timings = interleave(measures, fresh=fresh, options=settings.options)
    data = fresh(-1)
    peaks = {name: peak_memory(lambda run=run: run(data), settings.device) for name, run in runs.items()}
    held = {name: None if peak is None else peak + contenders[name].storage_bytes for name, peak in peaks.items()}
    return timings, held


def _entry(
    wanted: Entry,
    contenders: Mapping[str, _Contender],
    timings: Mapping[str, Timing],
    peaks: Mapping[str, int | None],
    *,
    full: Sequence[str],
) -> Entry:
    name = _name_of(wanted)
    return {
        **wanted,
        **times_of(timings[name], {baseline: timings[baseline] for baseline in full}),
        "peak_memory_bytes": peaks[name],
        "bf16_peak_memory_bytes": peaks[_BF16],
        "storage_bytes": contenders[name].storage_bytes,
        "bf16_storage_bytes": contenders[_BF16].storage_bytes,
    }


def times_of(timing: Timing, full: Mapping[str, Timing]) -> Entry:
    """Return the fields of a result that say how long it took, and full precision ("bf16", "fp32") in its rounds."""
    baseline = baseline_of(full, list(full))
    against: Entry = {f"{name}_milliseconds": other.milliseconds for name, other in full.items()}
    against |= {f"ratio_to_{name}": timing.faster_than(other) for name, other in full.items()}
    return {
        "milliseconds": timing.milliseconds,
        "milliseconds_quartiles": list(timing.quartiles),
        **against,
        "baseline": baseline,
        "ratio_to_baseline": timing.faster_than(full[baseline]),
        "rounds": len(timing.samples),
    }


def baseline_of(timings: Mapping[str, Timing], full: Sequence[str]) -> str:
    """Return the name of the fastest full precision."""
    return min(full, key=lambda name: timings[name].milliseconds)


def _name_of(entry: Mapping[str, Any]) -> str:
    return f"{entry['recipe']} {entry['scheme']} {entry['backend']}"


def _packed(linear: BlockLinear, recipe: Recipe, generator: torch.Generator) -> PackedLinear:
    (plan,) = resolve(recipe.model_copy(update={"skip": ()}), [linear])
    return random_packed_linear(plan, generator=generator, dtype=quantized_dtype(str(generator.device)))


def _full_linear(in_features: int, out_features: int, generator: torch.Generator, dtype: torch.dtype) -> _Contender:
    shape = (out_features, in_features)
    weight = torch.randn(shape, dtype=dtype, device=generator.device, generator=generator).mul_(in_features**-0.5)
    bias = torch.zeros(out_features, dtype=dtype, device=generator.device)
    return _Contender(run=lambda x: F.linear(x, weight, bias), storage_bytes=_bytes_of(weight, bias), reads=dtype)


def _int8_product(shape: tuple[int, int, int], generator: torch.Generator) -> _Contender:
    rows, in_features, out_features = shape
    weight = _random_codes((out_features, in_features), 4, generator)
    return _Contender(run=int8_gemm(weight, rows), storage_bytes=_bytes_of(weight), reads=8)


def _together(make: Callable[..., _Contender], count: int, *arguments: Any) -> _Contender:
    """As many contenders of a kind, one after the other on the same data."""
    contenders = [make(*arguments) for _ in range(count)]
    return replace(
        contenders[0],
        run=lambda data: [contender.run(data) for contender in contenders],
        storage_bytes=sum(contender.storage_bytes for contender in contenders),
    )


def _linear(layers: nn.ModuleList, backend: str, _rows: int, generator: torch.Generator) -> _Contender:
    set_backend(layers, backend)
    reads = quantized_dtype(str(generator.device))
    stored = _bytes_of(*layers.parameters())
    return _Contender(run=lambda x: [layer(x) for layer in layers], storage_bytes=stored, reads=reads)


def _activation_path(layers: nn.ModuleList, backend: str, _rows: int, generator: torch.Generator) -> _Contender:
    layer = _only(layers)
    activation = layer.scheme.activation
    assert activation is not None
    path = layer.input_tensors()
    parts = (path.shift, path.scale, path.left, path.right, path.low_rank_basis)
    stored = _bytes_of(*(part for part in parts if part is not None))

    def run(x: Tensor) -> object:
        return activation_path.activation_path(x, path, num_bits=activation.num_bits, backend=backend)

    return _Contender(run=run, storage_bytes=stored, reads=quantized_dtype(str(generator.device)))


def _gemm(layers: nn.ModuleList, backend: str, rows: int, generator: torch.Generator) -> _Contender:
    layer = _only(layers)
    activation = layer.scheme.activation
    assert activation is not None
    scale = torch.rand(rows, 1, device=generator.device, generator=generator)
    weight, dtype = layer.product_codes(), quantized_dtype(str(generator.device))

    def run(codes: Tensor) -> object:
        return rescaled_int_matmul.rescaled_int_matmul(
            codes,
            scale,
            weight,
            layer.weight_scale,
            bias=layer.bias,
            x_bits=activation.num_bits,
            w_bits=layer.scheme.weight.num_bits,
            out_dtype=dtype,
            backend=backend,
        )

    stored = _bytes_of(weight, layer.weight_scale, layer.bias)
    return _Contender(run=run, storage_bytes=stored, reads=activation.num_bits)


def _only(layers: nn.ModuleList) -> PackedLinear:
    (layer,) = layers
    assert isinstance(layer, PackedLinear)
    return layer


def _column_sums(backend: str) -> _Contender:
    run = functools.partial(attention_colsum.attention_colsum, backend=backend)
    return _Contender(run=lambda qkv: run(qkv[0], qkv[1]), storage_bytes=0)


_MAKERS: dict[str, Callable[..., _Contender]] = {"linear": _linear, "activation_path": _activation_path, "gemm": _gemm}


def _applies(op: str, recipe: Recipe) -> bool:
    """Whether an op has anything to do under a recipe; the integer product rescales by channel, not by group."""
    if op == "linear":
        return True
    return (
        recipe.activations is not None
        and not recipe.linear_scheme().simulated
        and (op != "gemm" or recipe.weights.group_size is None)
    )


def _random_codes(shape: tuple[int, int], bits: int, generator: torch.Generator) -> Tensor:
    limit = 1 << (bits - 1)
    return torch.randint(-limit, limit, shape, dtype=torch.int8, device=generator.device, generator=generator)


def _bytes_of(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)
