"""The full-precision model of a run, checked before any work is done on it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from s2q.common.arguments import parse_dtype
from s2q.common.components import TRANSFORMERS, full_name, has_adapter, split_name, text_encoders_of, transformers_of
from s2q.common.devices import default_dtype
from s2q.common.errors import InvalidInputError
from s2q.common.memory import page_out, tensors_of
from s2q.core.tokens import TokenLayout
from s2q.generation.offload import model_parts
from s2q.models import OUTSIDE, Family, ModelSource, block_names, family_of, token_layout
from s2q.models.hub import parse_hub_id
from s2q.models.quantized import already_quantized, full_precision_origin, quantization_method
from s2q.models.source import recommended_generation
from s2q.models.timesteps import mean_timestep_row
from s2q.pipelines import loading_class
from s2q.planning.cost import Workload
from s2q.planning.resolve import LinearPlan, quantized_attention, recipe_linears, resolve
from s2q.planning.text_encoders import check_encoder
from s2q.planning.workload import loaded_components, source_names, workload_of_recipe
from s2q.recipes.schema import Recipe
from s2q.shapes import embedded

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True, kw_only=True)
class TeacherTransformer:
    """One full-precision transformer and what the recipe wants of it.

    Attributes:
        module: The transformer; never changed.
        linears: Its linears that the recipe quantizes.
        tokens: How it makes tokens of its arguments; None if the recipe does not need their positions.
        attention: Names of its attention modules that the recipe quantizes.
    """

    component: str
    module: nn.Module
    linears: tuple[LinearPlan, ...]
    tokens: TokenLayout | None = None
    attention: tuple[str, ...] = ()

    @property
    def family(self) -> Family:
        """Its family."""
        return family_of(self.module)

    @cached_property
    def block_names(self) -> list[str]:
        """Names of its blocks in it, in the order in which they run."""
        return block_names(self.module, self.family)

    @cached_property
    def mean_row(self) -> Tensor | None:
        """Mean input of its modulation linears [in_features]; see `mean_timestep_row`."""
        return mean_timestep_row(self.module)

    def linears_of(self, block: int) -> tuple[LinearPlan, ...]:
        """Return the linears of a block by its index; `OUTSIDE` for those outside the blocks."""
        return tuple(linear for linear in self.linears if linear.block == block)

    def described_without_blocks(self) -> dict[str, Any]:
        """Describe what is quantized beside the linears of blocks, for fingerprints: outer linears and attention."""
        outer = {linear.name: [linear.scheme.to_dict(), linear.path.to_dict()] for linear in self.linears_of(OUTSIDE)}
        return {"outer": outer, "attention": list(self.attention)}

    def artefact_name(self, block: int) -> str:
        """Return the name of the artefact of a block by its index."""
        return full_name(self.component, f"block-{block:03d}")


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The full-precision model.

    Attributes:
        pipe: The pipeline; never changed.
        folder: Where it was loaded from; None if that is not known.
        transformers: Those that the recipe quantizes, in the order of the pipeline.
        dtype: Compute dtype of the transformers.
        stored: Dtype in which the checkpoint stores what is not quantized, and is to be run; `dtype` unless the device
            emulates it.
        workload: What calibration computes on; None for recipes that do not calibrate and pipelines that cannot.
        mapped: Whether its weights were mapped from files here, in the dtype in which they are stored there, so that
            they need not stay in memory.
        source: What it was loaded from; None for a pipeline that was given.
    """

    pipe: DiffusionPipeline
    name: str
    folder: Path | None
    transformers: tuple[TeacherTransformer, ...]
    dtype: torch.dtype
    stored: torch.dtype
    workload: Workload | None
    mapped: bool = False
    source: ModelSource | None = None

    @property
    def linears(self) -> list[LinearPlan]:
        """The linears that the recipe quantizes, of one transformer after the other."""
        return [linear for transformer in self.transformers for linear in transformer.linears]

    @property
    def attention(self) -> list[str]:
        """Full names of the attention modules that the recipe quantizes, of one transformer after the other."""
        parts = ((transformer.component, transformer.attention) for transformer in self.transformers)
        return [full_name(component, name) for component, names in parts for name in names]

    def transformer(self, component: str) -> TeacherTransformer:
        """Return the transformer of a component."""
        (transformer,) = (part for part in self.transformers if part.component == component)
        return transformer

    def with_linears(self, linears: Sequence[LinearPlan]) -> Teacher:
        """Return the teacher with other plans for its linears."""
        transformers = tuple(
            replace(transformer, linears=_of_component(linears, transformer.component))
            for transformer in self.transformers
        )
        return replace(self, transformers=transformers)

    @property
    def parts(self) -> list[nn.Module]:
        """The components of the pipeline that have weights."""
        return list(model_parts(self.pipe).values())

    @property
    def modules(self) -> Iterator[nn.Module]:
        """The modules of these components and theirs, down to the last."""
        return chain.from_iterable(part.modules() for part in self.parts)

    @property
    def family(self) -> Family:
        """The family of the model."""
        return family_of(self.pipe.transformer)

    @property
    def block_count(self) -> int:
        """Number of blocks, over all quantized transformers."""
        return sum(len(transformer.block_names) for transformer in self.transformers)

    def page_out(self, module: nn.Module) -> None:
        """Let the weights of a part leave host memory until they are read again."""
        if self.mapped:
            page_out(tensors_of(module))

    def as_stored(self) -> Teacher:
        """Return the teacher in the dtype of the checkpoint: itself, or loaded once more."""
        if self.source is None or self.dtype == self.stored:
            return self
        pipe = self.source.load_pipeline(dtype=self.stored)
        loaded = transformers_of(pipe)
        transformers = tuple(
            replace(transformer, module=loaded[transformer.component]) for transformer in self.transformers
        )
        return replace(self, pipe=pipe, transformers=transformers, dtype=self.stored)


def load_teacher(
    model: ModelSource | DiffusionPipeline,
    recipe: Recipe,
    *,
    dtype: torch.dtype | str | None,
    device: str = "cpu",
    linears: Sequence[LinearPlan] | None = None,
) -> Teacher:
    """Load the model, or take the one given, and check that it can be quantized.

    Args:
        dtype: Compute dtype, in which the rest of the checkpoint is stored too; None takes the pipeline's, or the
            stored one, and calibrates in float32 where the device emulates that (`common.devices.default_dtype`).
        linears: What its linears were resolved to in another process; None resolves them.
    """
    if isinstance(model, ModelSource):
        stored = parse_dtype(dtype) or model.stored_dtype()
        wide = dtype is None and recipe.calibrates
        pipe = model.load_pipeline(dtype=default_dtype(stored, device) if wide else stored)
        name, folder, source = model.name, model.folder, model
    else:
        pipe, source, stored = model, None, None
        name, folder = _origin(pipe)
    modules = transformers_of(pipe)
    if TRANSFORMERS[0] not in modules:
        raise InvalidInputError(f"{type(pipe).__name__} has no transformer; expected a text-to-video pipeline with one")
    first = modules[TRANSFORMERS[0]].dtype
    # what is converted, or has an adapter fused, is no longer in the file
    unchanged = isinstance(model, ModelSource) and not (model.loras or model.originals)
    mapped = unchanged and model.weights_dtype() == first
    for component, transformer in modules.items():
        _check_state(name, component, transformer, folder=folder, wanted=parse_dtype(dtype))
        if transformer.dtype != first:
            raise InvalidInputError(
                f"{name}: its transformer is loaded in {first} and its {component} in {transformer.dtype}; "
                "load both in the same dtype"
            )
        _check_finite(name, component, transformer, offload=mapped)
    if recipe.text_encoder is not None and linears is None:
        for component, encoder in text_encoders_of(pipe).items():
            check_encoder(name, component, encoder)
            _check_finite(name, component, encoder, offload=mapped)
    names = (name,) if source is None else source_names(source)
    workload = _workload(pipe, folder, recipe, names=names, warn=linears is None)
    frames = None if workload is None else workload.frames
    if linears is None:
        linears = resolve(recipe, recipe_linears(recipe, modules), frames=frames)
    attention = quantized_attention(recipe, modules)
    transformers = (
        TeacherTransformer(
            component=component,
            module=transformer,
            linears=_of_component(linears, component),
            tokens=token_layout(transformer, family_of(transformer)) if recipe.needs_grid else None,
            attention=tuple(name for part, name in map(split_name, attention) if part == component),
        )
        for component, transformer in modules.items()
    )
    return Teacher(
        pipe=pipe,
        name=name,
        folder=folder,
        transformers=tuple(transformer for transformer in transformers if transformer.linears),
        dtype=first,
        stored=stored or first,
        workload=workload,
        mapped=mapped,
        source=source,
    )


def _of_component(linears: Sequence[LinearPlan], component: str) -> tuple[LinearPlan, ...]:
    return tuple(linear for linear in linears if split_name(linear.name)[0] == component)


def _workload(
    pipe: DiffusionPipeline, folder: Path | None, recipe: Recipe, *, names: Sequence[str], warn: bool
) -> Workload | None:
    return workload_of_recipe(
        pipe,
        recipe,
        names=names,
        recommended=recommended_generation(folder),
        components=loaded_components(pipe),
        warn=warn,
    )


def _origin(pipe: DiffusionPipeline) -> tuple[str, Path | None]:
    location = str(getattr(pipe, "name_or_path", "") or "")
    if location in embedded.EMBEDDED_NAMES:
        return location, embedded.embedded_folder(location)
    if location and Path(location).is_dir():
        return Path(location).resolve().name, Path(location)
    return (location if parse_hub_id(location) else loading_class(type(pipe).__name__)), None


def _check_state(
    name: str, component: str, transformer: nn.Module, *, folder: Path | None, wanted: torch.dtype | None
) -> None:
    if (method := quantization_method(transformer)) is not None:
        raise already_quantized(name, component, method, origin=full_precision_origin(folder, transformer.config))
    if has_adapter(transformer):
        raise InvalidInputError(
            f"{name}: its {component} has an adapter; call fuse_lora() and then unload_lora_weights() on the pipeline, "
            "or the latter alone to quantize without it"
        )
    for tensor_name, tensor in transformer.state_dict().items():
        if tensor.is_meta:
            raise InvalidInputError(
                f"{name}: {full_name(component, tensor_name)} is offloaded; load the pipeline without offloading"
            )
    if wanted is not None and transformer.dtype != wanted:
        raise InvalidInputError(
            f"{name}: its {component} is loaded in {transformer.dtype}, dtype={wanted} asked for; "
            "load it in that dtype, or omit dtype"
        )


_LARGEST = math.sqrt(torch.finfo(torch.float32).max)
"""Of a weight: beyond it norms, errors and products of two weights overflow."""


def _check_finite(name: str, component: str, transformer: nn.Module, *, offload: bool) -> None:
    for tensor_name, tensor in transformer.state_dict().items():
        if tensor.is_floating_point() and tensor.numel():
            low, high = tensor.aminmax()
            largest = float(torch.maximum(high, -low))
            where = f"{name}: {full_name(component, tensor_name)}"
            if not math.isfinite(largest):
                count = int((~torch.isfinite(tensor)).sum())
                raise InvalidInputError(
                    f"{where} contains {count} NaN or infinite values; download or save the model again"
                )
            if largest > _LARGEST:
                raise InvalidInputError(
                    f"{where} contains a value of magnitude {largest:.3g}, whose square overflows float32: the model "
                    "itself gives NaN; download or save the model again"
                )
        if offload:
            page_out([tensor])
