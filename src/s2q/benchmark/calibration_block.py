"""One step of calibrating a block: forward, weighted loss, backward, AdamW, on one sample.

A run takes `samples · epochs` such steps for each block of the model, so that its time is known from one. Against it
stands a single bf16 forward pass of the same block on the same sample.

The block, its samples, its student and the step are those of a run (`s2q.blocks`): the stream carries the samples to
the first block, whose targets, token weights and input statistics the recipe's students start from.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from s2q.benchmark.case import Case, Entry, Settings
from s2q.benchmark.machine import peak_memory
from s2q.benchmark.micro import times_of
from s2q.benchmark.pipeline_steps import PROMPT, full_precision_pipeline
from s2q.benchmark.results import identity
from s2q.benchmark.steps import synthetic_tokens
from s2q.benchmark.synthetic_blocks import block_grid, block_inputs, synthetic_block
from s2q.benchmark.timing import interleave, measures_of, stopwatch_for
from s2q.blocks.distil import Optimization
from s2q.blocks.reconstruct import BlockStudents, block_students, rounding_penalty
from s2q.blocks.task import BlockTask
from s2q.calibration.samples import BlockSample
from s2q.calibration.stream import TeacherStream, named_arguments
from s2q.common.hooks import capture_calls
from s2q.common.seeds import derive_seed
from s2q.core.tokens import TokenLayout
from s2q.generation.denoise import denoise
from s2q.generation.settings import resolve_settings
from s2q.models import (
    Family,
    ModelSource,
    block_linears,
    block_names,
    family_of,
    linears_of_block,
    outer_linears,
)
from s2q.models.family import BlockLinear, token_layout
from s2q.models.synthetic import BlockList, SyntheticModel
from s2q.planning.resolve import resolve
from s2q.recipes.schema import Recipe

_OP = "calibration_block"
_BF16 = "bf16"
_SAMPLES = 2


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The transformer whose first block is calibrated, and samples of it.

    Attributes:
        transformer: Full precision; one block of a synthetic model.
        block_names: Names of its blocks, in the order in which they run.
        linears: Those that a recipe may name; at least those of the first block.
        calls: Keyword arguments of the transformer for each sample.
        tokens: How the transformer makes tokens of them.
        blocks: Blocks of the whole model.
    """

    transformer: nn.Module
    block_names: Sequence[str]
    linears: Sequence[BlockLinear]
    family: Family
    calls: Sequence[Mapping[str, Any]]
    tokens: TokenLayout
    blocks: int


def calibration_case(subject: SyntheticModel | ModelSource, settings: Settings) -> Case:
    """Make the case of `calibration_block`; it has a result for each recipe that distils."""
    name, tokens = subject.name, None
    if isinstance(subject, SyntheticModel):
        name, tokens = subject.label, synthetic_tokens(subject, settings)
    wanted = tuple(
        identity(op=_OP, scheme=recipe.linear_scheme().name, recipe=recipe.name, model=name, tokens=tokens)
        for recipe in settings.recipes
        if recipe.distillation is not None
    )

    def measure(missing: Sequence[Entry]) -> list[Entry]:
        if isinstance(subject, SyntheticModel):
            generator = torch.Generator(settings.device).manual_seed(derive_seed(0, _OP, subject.name))
            block_list, tokens = subject.block_lists[0], synthetic_tokens(subject, settings)
            block = synthetic_block(subject, block_list, generator=generator, dtype=torch.float32)
            made = synthetic_subject(subject, block_list, block, tokens=tokens, generator=generator)
            return _measure(made, missing, settings)
        return _measure(_pipeline_subject(subject, settings), missing, settings)

    label = f"{_OP} {name}" + ("" if tokens is None else f", {tokens} tokens")
    return Case(label=label, wanted=wanted, measure=measure)


@contextmanager
def first_block(subject: Subject, recipe: Recipe, *, device: str) -> Iterator[BlockStudents]:
    """Open the first block as a run does, with the samples of the subject.

    Yields:
        The block whose samples have been looked at.
    """
    frames = subject.tokens.grid(subject.calls[0]).frames if recipe.needs_grid else None
    with TemporaryDirectory() as folder:
        stream = TeacherStream(
            subject.transformer,
            subject.block_names,
            calls=[lambda call=call: dict(call) for call in subject.calls],
            names=[f"sample {index}" for index in range(len(subject.calls))],
            steps=range(len(subject.calls)),
            streams=subject.family.streams,
            folder=Path(folder),
            device=device,
            tokens=subject.tokens if recipe.needs_grid else None,
        )
        task = BlockTask(
            block=subject.transformer.get_submodule(subject.block_names[0]),
            linears=tuple(plan for plan in resolve(recipe, subject.linears, frames=frames) if plan.block == 0),
            recipe=recipe,
            family=subject.family,
            index=0,
            seed=0,
            device=device,
            stream=stream,
        )
        with block_students(task) as opened:
            yield opened
        stream.close()


def first_student(opened: BlockStudents) -> nn.Module:
    """Return the student as a run starts it, modulation rounded to nearest whatever the recipe says."""
    return opened.student(opened.nearest(opened.modulation))


def first_optimization(student: nn.Module, recipe: Recipe) -> Optimization:
    """Return what takes the steps of distillation as a run of this recipe does."""
    assert recipe.distillation is not None
    return Optimization(
        student,
        options=recipe.distillation,
        samples=recipe.calibration.samples,
        temporal=recipe.loss.temporal,
        penalty=rounding_penalty(student, recipe.rounding),
    )


def synthetic_subject(
    model: SyntheticModel,
    block_list: BlockList,
    block: nn.Module,
    *,
    tokens: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    samples: int = _SAMPLES,
) -> Subject:
    """Return a block of a published model and random samples of it."""
    grid = block_grid(model, tokens=tokens)
    sizes = {"num_frames": grid.frames, "height": grid.height, "width": grid.width}
    calls = [
        block_inputs(model, block_list, tokens=tokens, generator=generator, dtype=dtype, batch=1) | sizes
        for _ in range(samples)
    ]
    return Subject(
        transformer=_BlockAlone(block),
        block_names=[_BlockAlone.BLOCK],
        linears=linears_of_block(block, f"{block_list.name}.0", model.family),
        family=model.family,
        calls=calls,
        tokens=TokenLayout(latents="tokens", patch=(1, 1, 1), text=grid.text),
        blocks=sum(blocks.count for blocks in model.block_lists),
    )


class _BlockAlone(nn.Module):
    """A transformer that is one block: called with the arguments of the block, and with the sizes of the video."""

    BLOCK = "block"

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *, num_frames: int, height: int, width: int, return_dict: bool, **inputs: Any) -> Any:
        return self.block(**inputs)


def _pipeline_subject(source: ModelSource, settings: Settings) -> Subject:
    pipe = full_precision_pipeline(source, torch.float32, settings.device)
    transformer, family = pipe.transformer, family_of(pipe.transformer)
    video = resolve_settings(pipe, requested={"num_inference_steps": _SAMPLES}, defaults=dict(settings.generation))
    with capture_calls(transformer) as calls:
        denoise(pipe, [PROMPT], seeds=[0], settings=video, decode=False)
    names = block_names(transformer, family)
    return Subject(
        transformer=transformer,
        block_names=names,
        linears=[*block_linears(transformer, family), *outer_linears(transformer, family)],
        family=family,
        calls=[_first_of_batch(named_arguments(transformer, *call)) for call in calls[:_SAMPLES]],
        tokens=token_layout(transformer, family),
        blocks=len(names),
    )


def _first_of_batch(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Keep one sample of a call: calibration takes one at a time."""
    kept = {name: value[:1] if isinstance(value, Tensor) else value for name, value in arguments.items()}
    return {name: value for name, value in kept.items() if name != "return_dict"}


@dataclass(frozen=True, kw_only=True)
class _Contender:
    """A recipe's step, and the samples that it takes."""

    samples: Sequence[BlockSample]
    step: Callable[[BlockSample], object]


def _measure(subject: Subject, missing: Sequence[Entry], settings: Settings) -> list[Entry]:
    recipes = {recipe.name: recipe for recipe in settings.recipes}
    half = copy.deepcopy(subject.transformer.get_submodule(subject.block_names[0])).to(torch.bfloat16)
    with ExitStack() as stack:
        contenders: dict[str, _Contender] = {}
        for entry in missing:
            recipe = recipes[entry["recipe"]]
            opened = stack.enter_context(first_block(subject, recipe, device=settings.device))
            optimization = first_optimization(first_student(opened), recipe)
            samples = [opened.samples[index] for index in range(len(opened.samples))]
            contenders[recipe.name] = _Contender(samples=samples, step=optimization.step)
        inputs = next(iter(contenders.values())).samples
        runs: dict[str, Callable[[int], object]] = {_BF16: lambda index: _forward(half, inputs[index].inputs)}
        for name, contender in contenders.items():
            runs[name] = lambda index, contender=contender: contender.step(contender.samples[index])
        measures = measures_of(runs, stopwatch_for(settings.device), options=settings.options)
        timings = interleave(measures, fresh=lambda round_: round_ % _SAMPLES, options=settings.options)
        peaks = {name: peak_memory(lambda run=run: run(0), settings.device) for name, run in runs.items()}
    entries = []
    for entry in missing:
        recipe = recipes[entry["recipe"]]
        times = times_of(timings[recipe.name], {_BF16: timings[_BF16]})
        details = {
            "bound_ratio": None,
            "steps_per_block": _steps(recipe),
            "blocks_of_model": subject.blocks,
            "seconds_per_block": _steps(recipe) * times["milliseconds"] / 1000,
            "peak_memory_bytes": peaks[recipe.name],
            "bf16_peak_memory_bytes": peaks[_BF16],
        }
        entries.append(entry | times | details)
    return entries


def _steps(recipe: Recipe) -> int:
    assert recipe.distillation is not None
    return recipe.calibration.samples * recipe.distillation.epochs


@torch.no_grad()
def _forward(block: nn.Module, inputs: Mapping[str, Any]) -> object:
    return block(**_cast(inputs, torch.bfloat16))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Streams and embeddings in another dtype; angles of rotary embeddings, in tuples, stay in fp32."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return {name: _cast(item, dtype) for name, item in value.items()} if isinstance(value, Mapping) else value
