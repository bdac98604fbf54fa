"""One denoising step of a pipeline that can be run: its real loop in fp32, in bf16 and quantized, side by side.

A full-precision pipeline gets the packed linears that each recipe plans, with random codes: the same time, but videos
of noise. An s2q checkpoint keeps its packed linears, and the full-precision contenders use their dequantized weights.

The time of a step is the mean over the steps of a short generation except the first, which follows the encoding of the
prompt.
"""

import copy
import functools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from s2q.benchmark.breakdown import breakdown
from s2q.benchmark.case import Case, Entry, Settings
from s2q.benchmark.machine import full_precision, peak_memory, quantized_dtype
from s2q.benchmark.micro import BF16, result_of
from s2q.benchmark.results import identity
from s2q.benchmark.shapes import source_tokens
from s2q.benchmark.synthetic_blocks import random_packed_linear
from s2q.benchmark.timing import Timing, interleave
from s2q.calibration.teacher import TeacherTransformer
from s2q.checkpoint import read_config
from s2q.common.components import TRANSFORMERS
from s2q.common.hooks import capture_calls
from s2q.generation.denoise import denoise
from s2q.generation.load import load_pipeline
from s2q.generation.settings import GenerationSettings, resolve_settings, token_frames, video_tokens
from s2q.models import ModelSource, family_of
from s2q.models.attention import attention_of
from s2q.models.family import token_layout
from s2q.nn import PackedLinear, replace_module, set_backend
from s2q.nn.dequantized import FASTEST
from s2q.ops.dispatch import FP4
from s2q.planning.resolve import quantized_attention, recipe_linears, resolve
from s2q.recipes.schema import Recipe
from s2q.run.assemble import configure

_OP = "denoising_step"
_FP32 = "fp32"
_BACKENDS = ("auto", FASTEST, FP4)
_STEPS = 4
PROMPT = "a red circle moving left on a grey background"


def pipeline_step_case(source: ModelSource, settings: Settings) -> Case:
    """Make the case of `denoising_step` on a pipeline; it has a result for fp32 and one for each recipe."""
    tokens = source_tokens(source)[0]
    common = {"op": _OP, "model": source.name, "tokens": tokens}
    wanted = [identity(scheme=_FP32, backend="torch", **common)]
    if source.is_quantized:
        config = read_config(source.complete_folder())
        main_scheme = statistics.mode(scheme.name for scheme in config.layer_schemes().values())
        quantized = [(main_scheme, config.recipe)]
    else:
        quantized = [(recipe.linear_scheme().name, recipe.name) for recipe in settings.recipes]
    wanted += [
        identity(scheme=scheme, recipe=recipe, backend=backend, attention=settings.attention, **common)
        for scheme, recipe in quantized
        for backend in _BACKENDS
        if backend in settings.backends
    ]

    measure = functools.partial(_measure, source, settings)
    return Case(label=f"{_OP} {source.name}", wanted=tuple(wanted), measure=measure)


def pack_randomly(transformer: nn.Module, recipe: Recipe, *, frames: int) -> nn.Module:
    """Replace a transformer's linears by packed ones of a recipe, with random codes; return it, as a checkpoint's."""
    transformers = {TRANSFORMERS[0]: transformer}
    plans = resolve(recipe, recipe_linears(recipe, transformers), frames=frames)
    tokens = token_layout(transformer, family_of(transformer))
    teacher = TeacherTransformer(
        component=TRANSFORMERS[0],
        module=transformer,
        linears=tuple(plans),
        tokens=tokens,
        attention=tuple(quantized_attention(recipe, transformers)),
    )
    generator = torch.Generator(transformer.device).manual_seed(0)
    for plan in plans:
        layer = random_packed_linear(plan, generator=generator, dtype=transformer.dtype)
        replace_module(transformer, plan.name, layer)
    configure(transformer, teacher, recipe.name)
    return transformer


@torch.no_grad()
def _measure(source: ModelSource, settings: Settings, missing: Sequence[Entry]) -> list[Entry]:
    device = settings.device
    pipes: dict[str, Any] = {
        name: full_precision_pipeline(source, dtype, device) for name, dtype in full_precision(device).items()
    }
    full, dtype = list(pipes), quantized_dtype(device)
    packed_from = next(pipe for pipe in pipes.values() if pipe.transformer.dtype == dtype)
    first = pipes[BF16]
    video = resolve_settings(first, requested={"num_inference_steps": _STEPS}, defaults=dict(settings.generation))
    frames = token_frames(first, video)
    for entry in missing:
        if _name_of(entry) not in pipes:
            pipes[_name_of(entry)] = _pipeline_of(source, entry, packed_from, settings, frames=frames)
    attention = {_name_of(entry): entry["attention"] for entry in missing}

    def step_time(name: str, seed: int) -> float:
        with attention_of(attention.get(name)):
            return _step_time(pipes[name], video, seed, device)

    measures = {name: (lambda seed, name=name: step_time(name, seed)) for name in pipes}
    timings = interleave(measures, fresh=lambda round_: round_ + 1, options=settings.options)
    parts = {}
    for name, pipe in pipes.items():
        with attention_of(attention.get(name)):
            parts[name] = _parts(pipe, video, timings[name], device)
    details = {"video_tokens": video_tokens(first, video), "bound_ratio": None, "settings": video.to_dict()}
    against = {name: timings[name] for name in full}
    return [
        result_of(entry, timings[name], against, parts[name], parts[BF16]) | details
        for entry, name in zip(missing, map(_name_of, missing), strict=True)
    ]


def _name_of(entry: Entry) -> str:
    return _FP32 if entry["scheme"] == _FP32 else f"{entry['scheme']} {entry['recipe']} {entry['backend']}"


def _pipeline_of(source: ModelSource, entry: Entry, full: Any, settings: Settings, *, frames: int) -> Any:
    if entry["scheme"] == _FP32:
        return full_precision_pipeline(source, torch.float32, settings.device)
    if source.is_quantized:
        dtype = full.transformer.dtype
        return load_pipeline(source, dtype=dtype, device=settings.device, backend=entry["backend"], offload="none")
    recipe = next(recipe for recipe in settings.recipes if recipe.name == entry["recipe"])
    pipe = copy.copy(full)  # shares the text encoder and the autoencoder
    pipe.transformer = pack_randomly(copy.deepcopy(full.transformer), recipe, frames=frames)
    set_backend(pipe.transformer, entry["backend"])
    return pipe


def full_precision_pipeline(source: ModelSource, dtype: torch.dtype, device: str) -> Any:
    """Load a pipeline, the packed linears of a checkpoint dequantized."""
    pipe = load_pipeline(source, dtype=dtype, device=device, offload="none")
    if source.is_quantized:
        pipe.transformer.dequantize()
    return pipe


def _step_time(pipe: Any, settings: GenerationSettings, seed: int, device: str) -> float:
    """Milliseconds of a denoising step, the first one left out."""
    ends: list[float] = []

    def step_done() -> None:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        ends.append(time.perf_counter())

    denoise(pipe, [PROMPT], seeds=[seed], settings=settings, decode=False, step_done=step_done)
    return statistics.mean(late - early for early, late in zip(ends, ends[1:], strict=False)) * 1000


def _parts(pipe: Any, settings: GenerationSettings, timing: Timing, device: str) -> dict[str, Any]:
    """Breakdown, memory and storage of one pipeline's transformer."""
    with capture_calls(pipe.transformer) as calls:
        denoise(pipe, [PROMPT], seeds=[0], settings=settings, decode=False)
    args, kwargs = calls[-1]
    call = functools.partial(pipe.transformer, *args, **kwargs)
    shares = breakdown(call, pipe.transformer, device=device)
    storage = sum(tensor.nbytes for tensor in pipe.transformer.state_dict().values())
    peak = peak_memory(call, device)
    kept = sum(part.kept.num_bytes for part in pipe.transformer.modules() if isinstance(part, PackedLinear))
    return {
        "breakdown": {name: share * timing.milliseconds for name, share in shares.items()},
        "peak_memory_bytes": None if peak is None else peak + storage + kept,
        "storage_bytes": storage,
    }
