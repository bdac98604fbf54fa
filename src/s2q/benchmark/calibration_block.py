"""One step of calibrating a block: forward, weighted loss, backward, AdamW, on one sample.

A run takes `samples · epochs` such steps for each block of the model, so that its time is known from one. Against it
stands a single bf16 forward pass of the same block on the same sample.

The block, its samples, its student and the step are those of a run (`s2q.blocks`): the stream carries the samples to
the first block, whose targets, token weights and input statistics the recipe's students start from.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from s2q.benchmark.case import Case, Entry, Settings
from s2q.benchmark.machine import peak_memory
from s2q.benchmark.micro import BF16, result_of
from s2q.benchmark.pipeline_steps import PROMPT, full_precision_pipeline
from s2q.benchmark.results import identity
from s2q.benchmark.steps import synthetic_tokens
from s2q.benchmark.synthetic_blocks import block_grid, block_inputs, synthetic_block, token_positions
from s2q.benchmark.timing import compete
from s2q.blocks.distil import Optimization
from s2q.blocks.reconstruct import BlockStudents, block_students, rounding_penalty
from s2q.blocks.task import BlockTask
from s2q.calibration.stream import TeacherStream, named_arguments
from s2q.common.hooks import capture_calls
from s2q.common.memory import keep_freed_memory
from s2q.common.seeds import derive_seed
from s2q.common.temporaries import scratch_folder
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

    label = f"{_OP} {name}" + ("" if tokens is None else f", {tokens} tokens")
    return Case(label=label, wanted=wanted, measure=functools.partial(_measure, subject, settings))


@contextmanager
def first_block(subject: Subject, recipe: Recipe, *, device: str) -> Iterator[BlockStudents]:
    """Open the first block as a run does, and look at the samples of the subject."""
    keep_freed_memory()
    frames = subject.tokens.grid(subject.calls[0]).frames if recipe.needs_grid else None
    with scratch_folder("bench") as folder:
        stream = TeacherStream(
            subject.transformer,
            subject.block_names,
            calls=[lambda call=call: dict(call) for call in subject.calls],
            names=[f"sample {index}" for index in range(len(subject.calls))],
            steps=range(len(subject.calls)),
            family=subject.family,
            folder=folder,
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
    positions = token_positions(model, grid)
    names = {name: model.family.block_argument(name) for name in ("hidden_states", "encoder_hidden_states")}
    of_transformer = {of_block: name for name, of_block in names.items()}
    drawn = [
        block_inputs(model, block_list, tokens=tokens, generator=generator, dtype=dtype, batch=1)
        for _ in range(samples)
    ]
    calls = [{of_transformer.get(name, name): value for name, value in inputs.items()} | positions for inputs in drawn]
    return Subject(
        transformer=_BlockAlone(block, names),
        block_names=[_BlockAlone.BLOCK],
        linears=linears_of_block(block, f"{block_list.name}.0", model.family),
        family=replace(model.family, streams=model.family.streams_of(f"{block_list.name}.0")),
        calls=calls,
        tokens=TokenLayout(latents="packed" if model.family.is_packed else "tokens", patch=(1, 1, 1), text=grid.text),
        blocks=sum(blocks.count for blocks in model.block_lists),
    )


class _BlockAlone(nn.Module):
    """A transformer that is one block: called with the arguments of the block, and with the positions of the tokens.

    A block that needs the sizes of the video too gets them. `names` are those of its arguments by those of a
    transformer's.
    """

    BLOCK = "block"

    def __init__(self, block: nn.Module, names: Mapping[str, str]) -> None:
        super().__init__()
        self._names = names
        self.block, self.config = block, SimpleNamespace(patch_size=1)  # of the sizes that it is called with
        self._takes = inspect.signature(block.forward).parameters

    def forward(self, *, return_dict: bool, **inputs: Any) -> Any:
        names = self._names | {"num_frames": "frames"}
        named = {names.get(name, name): value for name, value in inputs.items()}
        return self.block(**{name: value for name, value in named.items() if name in self._takes})


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
    return {
        name: value[:1] if isinstance(value, Tensor) else value
        for name, value in arguments.items()
        if name != "return_dict"
    }


def _measure(model: SyntheticModel | ModelSource, settings: Settings, missing: Sequence[Entry]) -> list[Entry]:
    if isinstance(model, SyntheticModel):
        generator = torch.Generator(settings.device).manual_seed(derive_seed(0, _OP, model.name))
        block_list, tokens = model.block_lists[0], synthetic_tokens(model, settings)
        block = synthetic_block(model, block_list, generator=generator, dtype=torch.float32)
        subject = synthetic_subject(model, block_list, block, tokens=tokens, generator=generator)
    else:
        subject = _pipeline_subject(model, settings)
    device, recipes = settings.device, {recipe.name: recipe for recipe in settings.recipes}
    half = copy.deepcopy(subject.transformer.get_submodule(subject.block_names[0])).to(torch.bfloat16)
    runs: dict[str, Callable[[int], object]] = {}
    with ExitStack() as stack:
        for entry in missing:
            recipe = recipes[entry["recipe"]]
            opened = stack.enter_context(first_block(subject, recipe, device=device))
            step = first_optimization(first_student(opened), recipe).step
            samples = [opened.samples[index] for index in range(len(opened.samples))]
            runs.setdefault(BF16, lambda index, samples=samples: _forward(half, samples[index].inputs))
            runs[recipe.name] = lambda index, step=step, samples=samples: step(samples[index])
        timings = compete(runs, fresh=lambda round_: round_ % _SAMPLES, device=device, options=settings.options)
        peaks = {name: {"peak_memory_bytes": peak_memory(lambda run=run: run(0), device)} for name, run in runs.items()}
    full, entries = {BF16: timings[BF16]}, []
    for entry in missing:
        name, recipe = entry["recipe"], recipes[entry["recipe"]]
        steps = recipe.calibration.samples * recipe.distillation.epochs
        details = {
            "bound_ratio": None,
            "steps_per_block": steps,
            "blocks_of_model": subject.blocks,
            "seconds_per_block": steps * timings[name].milliseconds / 1000,
        }
        entries.append(result_of(entry, timings[name], full, peaks[name], peaks[BF16]) | details)
    return entries


@torch.no_grad()
def _forward(block: nn.Module, inputs: Mapping[str, Any]) -> object:
    return block(**_cast(inputs, torch.bfloat16))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Streams and embeddings in another dtype; angles of rotary embeddings, in tuples, stay in fp32."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return {name: _cast(item, dtype) for name, item in value.items()} if isinstance(value, Mapping) else value
