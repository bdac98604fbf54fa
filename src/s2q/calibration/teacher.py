"""The full-precision model of a run, checked before any work is done on it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from s2q.common.arguments import parse_dtype
from s2q.common.components import (
    TRANSFORMERS,
    full_name,
    has_adapter,
    split_name,
    transformers_of,
)
from s2q.common.devices import default_dtype
from s2q.common.errors import InvalidInputError
from s2q.common.memory import page_out, tensors_of
from s2q.core.schemes import LinearScheme
from s2q.core.tokens import TokenLayout
from s2q.models import BlockLinear, Family, ModelSource, block_names, family_of, token_layout
from s2q.models.hub import parse_hub_id
from s2q.planning.resolve import assign_schemes, recipe_linears
from s2q.recipes.schema import Recipe
from s2q.shapes import embedded

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True, kw_only=True)
class TeacherTransformer:
    """One full-precision transformer and what the recipe wants of it.

    Attributes:
        component: Its name in the pipeline.
        module: The transformer; never changed.
        linears: Every linear of its blocks, by full name.
        schemes: Scheme of each linear that the recipe quantizes, by full name.
        tokens: How it makes tokens of its arguments; None if the recipe does not ask where they lie.
    """

    component: str
    module: nn.Module
    linears: tuple[BlockLinear, ...]
    schemes: Mapping[str, LinearScheme]
    tokens: TokenLayout | None = None

    @property
    def family(self) -> Family:
        """Its family."""
        return family_of(self.module)

    @cached_property
    def block_names(self) -> list[str]:
        """Names of its blocks in it, in the order in which they run."""
        return block_names(self.module, self.family)

    def quantized_linears(self, block: int) -> list[BlockLinear]:
        """Return the linears of a block that the recipe quantizes.

        Args:
            block: Index of the block.
        """
        return [linear for linear in self.linears if linear.block == block and linear.name in self.schemes]

    def inner_names(self, block: int) -> dict[str, str]:
        """Return the linears of a block that the recipe quantizes: full name by name inside the block.

        Args:
            block: Index of the block.
        """
        prefix = f"{full_name(self.component, self.block_names[block])}."
        return {linear.name.removeprefix(prefix): linear.name for linear in self.quantized_linears(block)}

    def artefact_name(self, block: int) -> str:
        """Return the name of the artefact of a block.

        Args:
            block: Index of the block.
        """
        return full_name(self.component, f"block-{block:03d}")


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The full-precision model.

    Attributes:
        pipe: The pipeline; never changed.
        name: What to call the model.
        folder: Where it was loaded from; None if that is not known.
        transformers: Those that the recipe quantizes, in the order of the pipeline.
        dtype: Compute dtype of the transformers.
        stored: Dtype in which the checkpoint stores what is not quantized, and is to be run; `dtype` unless the device
            emulates it.
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
    mapped: bool = False
    source: ModelSource | None = None

    @property
    def parts(self) -> list[nn.Module]:
        """The components of the pipeline that have weights."""
        return [part for part in self.pipe.components.values() if isinstance(part, nn.Module)]

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
        return sum(len(one.block_names) for one in self.transformers)

    def page_out(self, module: nn.Module) -> None:
        """Let the weights of a part leave host memory until they are read again.

        Args:
            module: A component of the pipeline, or a block of a transformer.
        """
        if self.mapped:
            page_out(tensors_of(module))

    def as_stored(self) -> Teacher:
        """Return the teacher in the dtype of the checkpoint: itself, or loaded once more."""
        if self.source is None or self.dtype == self.stored:
            return self
        pipe = self.source.load_pipeline(dtype=self.stored)
        found = transformers_of(pipe)
        transformers = tuple(replace(one, module=found[one.component]) for one in self.transformers)
        return replace(self, pipe=pipe, transformers=transformers, dtype=self.stored)


def load_teacher(
    model: ModelSource | DiffusionPipeline, recipe: Recipe, *, dtype: torch.dtype | str | None, device: str = "cpu"
) -> Teacher:
    """Load the model, or take the one given, and check that it can be quantized.

    Args:
        model: A resolved source, or a loaded pipeline.
        recipe: The recipe.
        dtype: Compute dtype, in which the rest of the checkpoint is stored too; None takes the pipeline's, or the
            stored one, and calibrates in float32 where the device emulates that (`core.devices.default_dtype`).
        device: Where it will compute.

    Returns:
        The teacher.

    Raises:
        InvalidInputError: If the model is quantized, has adapters or weights elsewhere, is of an unsupported class, has
            another dtype than the one asked for, or holds values that are not finite (names the tensor).
    """
    if isinstance(model, ModelSource):
        stored = parse_dtype(dtype) or model.stored_dtype()
        wide = dtype is None and recipe.calibrates
        pipe = model.load_pipeline(dtype=default_dtype(stored, device) if wide else stored)
        name, folder, source = model.name, model.folder, model
    else:
        pipe, source, stored = model, None, None
        name, folder = _origin(pipe)
    found = transformers_of(pipe)
    if TRANSFORMERS[0] not in found:
        raise InvalidInputError(f"{type(pipe).__name__} has no transformer; expected a text-to-video pipeline with one")
    first = found[TRANSFORMERS[0]].dtype
    mapped = isinstance(model, ModelSource) and model.weights_dtype() == first  # what is converted is no longer a file
    for component, transformer in found.items():
        _check_state(name, component, transformer, wanted=parse_dtype(dtype))
        if transformer.dtype != first:
            raise InvalidInputError(
                f"{name}: its transformer is loaded in {first} and its {component} in {transformer.dtype}; "
                "load both in one dtype"
            )
        _check_finite(name, component, transformer, offload=mapped)
    linears = recipe_linears(recipe, found)
    schemes = assign_schemes(recipe, linears)
    transformers = (
        TeacherTransformer(
            component=component,
            module=transformer,
            linears=tuple(one for one in linears if split_name(one.name)[0] == component),
            schemes={name: scheme for name, scheme in schemes.items() if split_name(name)[0] == component},
            tokens=token_layout(transformer, family_of(transformer)) if recipe.needs_grid else None,
        )
        for component, transformer in found.items()
    )
    return Teacher(
        pipe=pipe,
        name=name,
        folder=folder,
        transformers=tuple(one for one in transformers if one.schemes),
        dtype=first,
        stored=stored or first,
        mapped=mapped,
        source=source,
    )


def _origin(pipe: DiffusionPipeline) -> tuple[str, Path | None]:
    location = str(getattr(pipe, "name_or_path", "") or "")
    if location in embedded.EMBEDDED_NAMES:
        return location, embedded.embedded_folder(location)
    if location and Path(location).is_dir():
        return Path(location).resolve().name, Path(location)
    return (location if parse_hub_id(location) else type(pipe).__name__), None


def _check_state(name: str, component: str, transformer: nn.Module, *, wanted: torch.dtype | None) -> None:
    if getattr(transformer, "is_quantized", False):
        raise InvalidInputError(f"{name}: its {component} is quantized already; pass the full-precision model")
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
            "load it in that dtype, or leave dtype out"
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
                    f"{where} holds {count} values that are NaN or infinite; download or save the model again"
                )
            if largest > _LARGEST:
                raise InvalidInputError(
                    f"{where} holds a value of magnitude {largest:.3g}, whose square overflows float32: the model "
                    "itself gives NaN; download or save the model again"
                )
        if offload:
            page_out([tensor])
