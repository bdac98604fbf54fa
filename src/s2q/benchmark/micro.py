"""Single operations on the shapes of published layers, each against full precision in the same rounds.

| op | measured | against |
|---|---|---|
| `linear` | a packed linear as a model runs it; three that share an input (q, k, v) | as many `F.linear` |
| `activation_path` | transform and quantization of its input | the same `F.linear`: what it adds to the layer |
| `gemm` | packed weight, integer product, scales, bias | the same `F.linear` |
| `attention_colsum` | column sums of attention | bf16 scaled dot product attention |
| `int8_attention`, on a GPU | attention with int8 queries and keys | the same |

`F.linear` runs in bf16, on a CPU in fp32 too; the faster is the baseline. Quantized layers run in bf16, or in fp32 on a
CPU that emulates it. `bound_ratio` of `linear` and `gemm`: the baseline over the plain int8 product of the same shape.

Legend: `M` rows, `K` in features, `N` out features; `H` heads, `D` head dim.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2q.benchmark.case import Case, Entry, Settings
from s2q.benchmark.machine import full_precision, has_int8_gemm, int8_gemm, peak_memory, quantized_dtype
from s2q.benchmark.results import identity
from s2q.benchmark.shapes import AttentionShape, LayerShape
from s2q.benchmark.synthetic_blocks import random_packed_linear, video_grid
from s2q.benchmark.timing import Run, Timing, compete
from s2q.common.seeds import derive_seed
from s2q.core.tokens import token_grid
from s2q.models.family import BlockLinear
from s2q.nn import set_backend, share_inputs
from s2q.ops import activation_path, attention_colsum, int8_attention, rescaled_int_matmul
from s2q.ops.dispatch import resolve_backend
from s2q.planning.resolve import resolve
from s2q.recipes.schema import Recipe

BF16, INT8 = "bf16", "int8"

FRAMES = 13
"""Latent frames, at most, that the rows of a linear are the tokens of; CogVideoX has as many."""

OP_BACKENDS: Mapping[str, Mapping[str, Any]] = {
    "linear": rescaled_int_matmul.BACKENDS,
    "activation_path": activation_path.BACKENDS,
    "gemm": rescaled_int_matmul.BACKENDS,
    "attention_colsum": attention_colsum.BACKENDS,
    "int8_attention": int8_attention.BACKENDS,
}
"""The backends of the ops that are measured here; a packed linear has those of the product."""

ATTENTION: Mapping[str, Callable[..., Callable[[Tensor], Tensor]]] = {
    "attention_colsum": lambda backend: lambda qkv: attention_colsum.attention_colsum(*qkv[:2], backend=backend),
    "int8_attention": lambda backend: lambda qkv: int8_attention.int8_attention(*qkv, backend=backend),
}
"""The ops of attention, by backend functions of queries, keys and values [3, B, H, N, D]."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to compute an op; `reads` is the dtype of its x, or the width of the codes that it reads in its place."""

    run: Run
    storage_bytes: int
    reads: torch.dtype | int = torch.bfloat16


def linear_cases(op: str, shapes: Sequence[LayerShape], settings: Settings) -> list[Case]:
    """Make the cases of `linear`, `activation_path` or `gemm`: one a shape, and one for each q, k and v together."""
    recipes = [recipe for recipe in settings.recipes if _applies(op, recipe)]
    cases = []
    alone = [(shape, 1) for shape in shapes]
    shared = [(shape, 3) for shape in shapes if op == "linear" and any(name.endswith("to_k") for name in shape.layers)]
    for shape, readers in alone + shared:
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
            for backend in _backends(op, settings)
        )
        label = f"{op} {' × '.join(map(str, shape.shape))}" + (f", {readers} together" if readers > 1 else "")
        measure = functools.partial(_measure_linear, op, shape, settings)
        cases.append(Case(label=label, wanted=wanted, measure=measure))
    return cases


def attention_cases(op: str, shapes: Sequence[AttentionShape], settings: Settings) -> list[Case]:
    """Make the cases of an op of `ATTENTION`, one a shape; the CPU has no kernel for int8 attention."""
    if op == "int8_attention" and settings.device == "cpu":
        return []
    cases = []
    for shape in shapes:
        full = [shape.tokens, shape.heads * shape.head_dim, shape.tokens]
        wanted = tuple(identity(op=op, scheme=BF16, backend=backend, shape=full) for backend in _backends(op, settings))
        measure = functools.partial(_measure_attention, op, shape, settings)
        cases.append(Case(label=f"{op} {shape.tokens} × {full[1]}", wanted=wanted, measure=measure))
    return cases


def _backends(op: str, settings: Settings) -> list[str]:
    """The backends of an op that were asked for."""
    return [name for name in ("auto", *OP_BACKENDS[op]) if name in settings.backends]


def _measure_linear(op: str, shape: LayerShape, settings: Settings, missing: Sequence[Entry]) -> list[Entry]:
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
    contenders = {
        name: full_linear(in_features, out_features, generator, dtype, readers=readers)
        for name, dtype in full_precision(settings.device).items()
    }
    if op != "activation_path" and has_int8_gemm(settings.device):
        contenders[INT8] = int8_product(shape.shape, generator, readers=readers)
    recipes = {recipe.name: recipe for recipe in settings.recipes}
    for entry in missing:
        (plan,) = resolve(recipes[entry["recipe"]].model_copy(update={"skip": ()}), [linear])
        dtype = quantized_dtype(settings.device)
        packed = [random_packed_linear(plan, generator=generator, dtype=dtype) for _ in range(readers)]
        layers = nn.ModuleList(packed)
        share_inputs(layers)
        contenders[_name_of(entry)] = _quantized(op, layers, entry["backend"], rows, generator, dtype)
    fresh = round_data(contenders, rows, in_features, generator)
    return _results(op, contenders, fresh, settings, missing, layers=list(shape.layers))


def _measure_attention(op: str, shape: AttentionShape, settings: Settings, missing: Sequence[Entry]) -> list[Entry]:
    generator = torch.Generator(settings.device).manual_seed(derive_seed(0, "attention", shape.tokens))
    size = (3, 1, shape.heads, shape.tokens, shape.head_dim)

    def fresh(_round: int) -> dict[Any, Tensor]:
        return {torch.bfloat16: torch.randn(size, dtype=torch.bfloat16, device=settings.device, generator=generator)}

    contenders = {BF16: Contender(run=lambda qkv: F.scaled_dot_product_attention(*qkv), storage_bytes=0)}
    for entry in missing:
        contenders[_name_of(entry)] = Contender(run=ATTENTION[op](entry["backend"]), storage_bytes=0)
    layers = [f"{model} attention" for model in shape.models]
    return _results(op, contenders, fresh, settings, missing, layers=layers, heads=shape.heads)


@torch.no_grad()
def _results(
    op: str,
    contenders: Mapping[str, Contender],
    fresh: Callable[[int], Any],
    settings: Settings,
    missing: Sequence[Entry],
    **details: Any,
) -> list[Entry]:
    device = settings.device
    runs = runs_of(contenders)
    timings = compete(runs, fresh=fresh, device=device, options=settings.options)
    data, parts = fresh(-1), {}
    for name, run in runs.items():
        peak, storage = peak_memory(functools.partial(run, data), device), contenders[name].storage_bytes
        parts[name] = {"peak_memory_bytes": None if peak is None else peak + storage, "storage_bytes": storage}
    full = {name: timings[name] for name in full_precision(device) if name in timings}
    bound = timings[INT8].faster_than(full[fastest(full)]) if INT8 in timings else None
    probe = torch.empty(0, dtype=torch.bfloat16, device=device)
    return [
        result_of(entry, timings[_name_of(entry)], full, parts[_name_of(entry)], parts[BF16])
        | {"bound_ratio": bound, "ran": resolve_backend(entry["backend"], probe, OP_BACKENDS[op])}
        | details
        for entry in missing
    ]


def runs_of(contenders: Mapping[str, Contender]) -> dict[str, Run]:
    """Return functions of a round's data, by what contenders read."""
    return {name: (lambda data, way=contender: way.run(data[way.reads])) for name, contender in contenders.items()}


def round_data(
    contenders: Mapping[str, Contender], rows: int, in_features: int, generator: torch.Generator
) -> Callable[[int], dict[Any, Tensor]]:
    """Return what draws an x [M, K] of each kind that contenders read."""
    kinds = {contender.reads for contender in contenders.values()}

    def fresh(_round: int) -> dict[Any, Tensor]:
        x = torch.randn(rows, in_features, dtype=torch.bfloat16, device=generator.device, generator=generator)
        codes = {bits: _random_codes((rows, in_features), bits, generator) for bits in kinds if isinstance(bits, int)}
        return codes | {dtype: x.to(dtype) for dtype in kinds if isinstance(dtype, torch.dtype)}

    return fresh


def result_of(
    entry: Entry, timing: Timing, full: Mapping[str, Timing], parts: Mapping[str, Any], bf16: Mapping[str, Any]
) -> Entry:
    """Return a result: how long it took, full precision ("bf16", "fp32") in its rounds, and parts of both."""
    baseline = fastest(full)
    return {
        **entry,
        "milliseconds": timing.milliseconds,
        "milliseconds_quartiles": list(timing.quartiles),
        **{f"{name}_milliseconds": other.milliseconds for name, other in full.items()},
        **{f"ratio_to_{name}": timing.faster_than(other) for name, other in full.items()},
        "baseline": baseline,
        "ratio_to_baseline": timing.faster_than(full[baseline]),
        "rounds": len(timing.samples),
        **parts,
        **{f"{BF16}_{name}": value for name, value in bf16.items()},
    }


def fastest(timings: Mapping[str, Timing]) -> str:
    """Return the name of the least time."""
    return min(timings, key=lambda name: timings[name].milliseconds)


def _name_of(entry: Mapping[str, Any]) -> str:
    return f"{entry['recipe']} {entry['scheme']} {entry['backend']}"


def full_linear(
    in_features: int, out_features: int, generator: torch.Generator, dtype: torch.dtype, *, readers: int = 1
) -> Contender:
    """Make `F.linear` on x [M, K], with as many weights as it has readers."""
    shape = (readers, out_features, in_features)
    weights = torch.randn(shape, dtype=dtype, device=generator.device, generator=generator).mul_(in_features**-0.5)
    bias = torch.zeros(readers, out_features, dtype=dtype, device=generator.device)
    layers = list(zip(weights, bias, strict=True))
    return Contender(
        run=lambda x: [F.linear(x, *layer) for layer in layers], storage_bytes=_bytes_of(weights, bias), reads=dtype
    )


def int8_product(shape: tuple[int, int, int], generator: torch.Generator, *, readers: int = 1) -> Contender:
    """Make the plain int8 product of [M, K, N] on codes of x [M, K], with as many weights as it has readers."""
    rows, in_features, out_features = shape
    weights = [_random_codes((out_features, in_features), 4, generator) for _ in range(readers)]
    products = [int8_gemm(weight, rows) for weight in weights]
    return Contender(run=lambda x: [product(x) for product in products], storage_bytes=_bytes_of(*weights), reads=8)


def _quantized(
    op: str, layers: nn.ModuleList, backend: str, rows: int, generator: torch.Generator, dtype: torch.dtype
) -> Contender:
    """Make an op of packed linears; all but `linear` have one."""
    if op == "linear":
        set_backend(layers, backend)
        stored = _bytes_of(*layers.parameters())
        grid = video_grid(rows, frames=FRAMES)

        def run_layers(x: Tensor) -> list[Tensor]:
            with token_grid(grid):
                return [layer(x.unsqueeze(0)) for layer in layers]

        return Contender(run=run_layers, storage_bytes=stored, reads=dtype)
    (layer,) = layers
    bits = layer.scheme.activation.num_bits
    if op == "activation_path":
        path = layer.input_tensors()
        parts = (path.shift, path.scale, path.left, path.right, path.low_rank_basis)
        stored = _bytes_of(*(part for part in parts if part is not None))
        run = functools.partial(activation_path.activation_path, path=path, num_bits=bits, backend=backend)
        return Contender(run=run, storage_bytes=stored, reads=dtype)
    run = functools.partial(
        rescaled_int_matmul.rescaled_int_matmul,
        x_scale=torch.rand(rows, 1, device=generator.device, generator=generator),
        w_codes=layer.product_codes(),
        w_scale=layer.weight_scale,
        bias=layer.bias,
        x_bits=bits,
        w_bits=layer.scheme.weight.product_bits,
        out_dtype=dtype,
        backend=backend,
    )
    stored = _bytes_of(run.keywords["w_codes"], layer.weight_scale, layer.bias)
    return Contender(run=run, storage_bytes=stored, reads=bits)


def _applies(op: str, recipe: Recipe) -> bool:
    """Whether an op has anything to do under a recipe; the integer product rescales by channel, not by group."""
    if op == "linear":
        return True
    return (
        recipe.activations is not None
        and not recipe.linear_scheme().simulated
        and recipe.activations.delta is None  # its means have a path and a product of their own
        and (op != "gemm" or recipe.weights.group_size is None)
    )


def _random_codes(shape: tuple[int, int], bits: int, generator: torch.Generator) -> Tensor:
    limit = 1 << (bits - 1)
    return torch.randint(-limit, limit, shape, dtype=torch.int8, device=generator.device, generator=generator)


def _bytes_of(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)
