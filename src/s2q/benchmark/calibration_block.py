"""One step of calibrating a block: forward, weighted loss, backward, AdamW, on one sample.

A run takes `samples · epochs` such steps for each block of the model, so that its time is known from one. Against it
stands a single bf16 forward pass of the same block on the same sample.

The student is the block in fp32 with its linears replaced as a run replaces them; what it learns starts where a run
starts it, without the smooth scale's statistics, which change nothing about the time. Column sums of attention are a
measurement of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from s2q.benchmark.case import (
    Case,
    Entry,
    Settings,
)
from s2q.benchmark.machine import peak_memory
from s2q.benchmark.micro import times_of
from s2q.benchmark.results import identity
from s2q.benchmark.steps import synthetic_tokens
from s2q.benchmark.synthetic_blocks import block_inputs, synthetic_block
from s2q.benchmark.timing import interleave, measures_of, stopwatch_for
from s2q.calibration.stream import named_arguments
from s2q.common.seeds import derive_seed
from s2q.core.memo import memoization
from s2q.core.schemes import LinearScheme
from s2q.distillation.loss import weighted_token_loss
from s2q.generation.denoise import denoise
from s2q.generation.load import load_pipeline
from s2q.generation.settings import resolve_settings
from s2q.models import ModelSource, block_linears, block_names, family_of, linears_of_block
from s2q.models.family import BlockLinear
from s2q.models.synthetic import SyntheticModel
from s2q.nn import LearnableClip, StudentInput, StudentLinear, replace_module
from s2q.planning.resolve import resolve
from s2q.recipes.schema import Recipe
from s2q.rounding import AdaRound, LearnedRounding, penalize, roundings_of, soft_rounding
from s2q.transforms import ROTATIONS, Compose, SmoothScale, Transform

_OP = "calibration_block"
_BF16 = "bf16"
_PROMPT = "a red circle moving left on a grey background"

Draw = Callable[[int], dict[str, Any]]


def calibration_case(subject: SyntheticModel | ModelSource, settings: Settings) -> Case:
    """Make the case of `calibration_block`; it has a result for each recipe that distils.

    Args:
        subject: The model; its first block is taken.
        settings: What was asked for.
    """
    synthetic = isinstance(subject, SyntheticModel)
    name = subject.label if isinstance(subject, SyntheticModel) else subject.name
    tokens = synthetic_tokens(subject, settings) if isinstance(subject, SyntheticModel) else None
    wanted = tuple(
        identity(op=_OP, scheme=recipe.linear_scheme().name, recipe=recipe.name, model=name, tokens=tokens)
        for recipe in settings.recipes
        if recipe.distillation is not None
    )

    def measure(missing: Sequence[Entry]) -> list[Entry]:
        if isinstance(subject, SyntheticModel):
            block, linears, fresh, blocks = _synthetic(subject, settings)
        else:
            block, linears, fresh, blocks = _of_pipeline(subject, settings)
        return _measure(block, linears, fresh, missing, settings, blocks=blocks)

    label = f"{_OP} {name}" + (f", {tokens} tokens" if synthetic else "")
    return Case(label=label, wanted=wanted, measure=measure)


def student_of(block: nn.Module, linears: Mapping[str, BlockLinear], recipe: Recipe) -> nn.Module:
    """Return a copy of a block with learnable students in place of the linears that a recipe quantizes.

    Args:
        block: Full precision, fp32.
        linears: Its linears by their names inside it.
        recipe: The recipe.
    """
    student = copy.deepcopy(block).requires_grad_(False)
    for linear in resolve(recipe, list(linears.values())):
        if linear.role == "linear":
            module = student.get_submodule(linear.inner_name)
            assert isinstance(module, nn.Linear)
            replace_module(student, linear.inner_name, _student_linear(module, linear.scheme, recipe))
    return student


def _student_linear(linear: nn.Linear, scheme: LinearScheme, recipe: Recipe) -> StudentLinear:
    settings, device = recipe.transforms, linear.weight.device
    parts: list[Transform] = []
    if settings.scale != "none":
        parts.append(SmoothScale(torch.ones(linear.in_features), learnable=settings.learn_scale))
    if settings.rotation != "identity":
        parts.append(ROTATIONS[settings.rotation](linear.in_features, seed=0))
    transform = None if not parts else parts[0] if len(parts) == 1 else Compose(*parts)
    clip = LearnableClip((1,), device=device) if recipe.clip.activations else None
    source = StudentInput(scheme.activation, transform=None if transform is None else transform.to(device), clip=clip)
    if recipe.clip.weights:
        return StudentLinear.with_clip(linear, scheme=scheme, source=source)
    student = StudentLinear(linear, scheme=scheme, source=source)
    if recipe.rounding.learned:
        student.rounding = LearnedRounding(student.folded_weight(), scheme.weight)
    return student


def _measure(
    block: nn.Module,
    linears: Mapping[str, BlockLinear],
    fresh: Draw,
    missing: Sequence[Entry],
    settings: Settings,
    *,
    blocks: int,
) -> list[Entry]:
    half = copy.deepcopy(block).to(torch.bfloat16)
    runs: dict[str, Callable[[Any], object]] = {_BF16: lambda data: _forward(half, data)}
    recipes = {recipe.name: recipe for recipe in settings.recipes}
    for entry in missing:
        runs[entry["recipe"]] = _optimisation_step(student_of(block, linears, recipes[entry["recipe"]]))
    measures = measures_of(runs, stopwatch_for(settings.device), options=settings.options)
    timings = interleave(measures, fresh=fresh, options=settings.options)
    data = fresh(-1)
    peaks = {name: peak_memory(lambda run=run: run(data), settings.device) for name, run in runs.items()}
    entries = []
    for entry in missing:
        recipe = recipes[entry["recipe"]]
        assert recipe.distillation is not None
        steps = recipe.calibration.samples * recipe.distillation.epochs
        times = times_of(timings[recipe.name], {_BF16: timings[_BF16]})
        details = {
            "bound_ratio": None,
            "steps_per_block": steps,
            "blocks_of_model": blocks,
            "seconds_per_block": steps * times["milliseconds"] / 1000,
            "peak_memory_bytes": peaks[recipe.name],
            "bf16_peak_memory_bytes": peaks[_BF16],
        }
        entries.append(entry | times | details)
    return entries


@torch.no_grad()
def _forward(block: nn.Module, inputs: Mapping[str, Any]) -> object:
    return block(**_cast(inputs, torch.bfloat16))


def _optimisation_step(student: nn.Module) -> Callable[[Any], object]:
    learnable = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learnable, lr=1e-6)

    def run(inputs: Mapping[str, Any]) -> None:
        with torch.enable_grad(), memoization(), soft_rounding(student):
            outputs = student(**inputs)
            streams: Iterable[Tensor] = outputs if isinstance(outputs, tuple) else (outputs,)
            streams = tuple(streams)
            loss = weighted_token_loss(streams, tuple(torch.zeros_like(one) for one in streams))
            optimizer.zero_grad(set_to_none=True)
            (loss / loss.detach()).backward()
            penalize(roundings_of(student), 1.0, options=AdaRound())
        optimizer.step()

    return run


def _synthetic(model: SyntheticModel, settings: Settings) -> tuple[nn.Module, dict[str, BlockLinear], Draw, int]:
    block_list, tokens = model.block_lists[0], synthetic_tokens(model, settings)
    generator = torch.Generator(settings.device).manual_seed(derive_seed(settings.seed, _OP, model.name))
    block = synthetic_block(model, block_list, generator=generator, dtype=torch.float32)
    prefix = f"{block_list.name}.0"
    linears = {one.name.removeprefix(f"{prefix}."): one for one in linears_of_block(block, prefix, model.family)}

    def fresh(_round: int) -> dict[str, Any]:
        return block_inputs(model, block_list, tokens=tokens, generator=generator, dtype=torch.float32, batch=1)

    return block, linears, fresh, sum(one.count for one in model.block_lists)


def _of_pipeline(source: ModelSource, settings: Settings) -> tuple[nn.Module, dict[str, BlockLinear], Draw, int]:
    pipe = load_pipeline(source, dtype=torch.float32, device=settings.device)
    if source.is_quantized:
        pipe.transformer.dequantize()
    family = family_of(pipe.transformer)
    names = block_names(pipe.transformer, family)
    block = pipe.transformer.get_submodule(names[0])
    own = resolve_settings(pipe, requested={"num_inference_steps": 1}, defaults=dict(settings.generation))
    calls: list[dict[str, Any]] = []
    handle = block.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(named_arguments(module, args, kwargs)), with_kwargs=True
    )
    try:
        denoise(pipe, [_PROMPT], seeds=[0], settings=own, decode=False)
    finally:
        handle.remove()
    captured = _first_sample(calls[0])
    generator = torch.Generator(settings.device).manual_seed(derive_seed(settings.seed, _OP, source.name))

    def fresh(_round: int) -> dict[str, Any]:
        new = {
            name: torch.randn(captured[name].shape, device=settings.device, generator=generator)
            for name in family.streams
        }
        return captured | new

    prefix = f"{names[0]}."
    linears = {
        one.name.removeprefix(prefix): one
        for one in block_linears(pipe.transformer, family)
        if one.name.startswith(prefix)
    }
    return copy.deepcopy(block), linears, fresh, len(names)


def _first_sample(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the first sample of a batch: calibration takes one at a time."""
    return {name: value[:1] if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Streams and embeddings in another dtype; angles of rotary embeddings, in tuples, stay in fp32."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return {name: _cast(one, dtype) for name, one in value.items()} if isinstance(value, Mapping) else value
