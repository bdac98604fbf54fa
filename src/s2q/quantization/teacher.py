"""The full-precision model of a run, checked before any work is done on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from s2q.core.errors import InvalidInputError
from s2q.core.placement import page_out, tensors_of
from s2q.core.schemes import LinearScheme
from s2q.models import BlockLinear, ModelSource, block_names, family_of
from s2q.models.source import HUB_ID, parse_dtype
from s2q.recipes import Recipe, assign_schemes, recipe_linears
from s2q.shapes import embedded

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The full-precision model and what the recipe wants of it.

    Attributes:
        pipe: The pipeline; never changed.
        name: What to call the model.
        folder: Where it was loaded from; None if that is not known.
        linears: Every linear of its blocks.
        schemes: Scheme of each linear that the recipe quantizes, by full name.
        dtype: Compute dtype of the transformer.
        mapped: Whether its weights were mapped from files here, so that they need not stay in memory.
    """

    pipe: DiffusionPipeline
    name: str
    folder: Path | None
    linears: tuple[BlockLinear, ...]
    schemes: Mapping[str, LinearScheme]
    dtype: torch.dtype
    mapped: bool = False

    @property
    def parts(self) -> list[nn.Module]:
        """The components of the pipeline that have weights."""
        return [part for part in self.pipe.components.values() if isinstance(part, nn.Module)]

    @property
    def modules(self) -> Iterator[nn.Module]:
        """The modules of these components and theirs, down to the last."""
        return chain.from_iterable(part.modules() for part in self.parts)

    @property
    def transformer(self) -> nn.Module:
        """The transformer."""
        return self.pipe.transformer

    @cached_property
    def block_names(self) -> list[str]:
        """Full names of the blocks, in the order in which they run."""
        return block_names(self.transformer, family_of(self.transformer))

    def quantized_linears(self, block: int) -> list[BlockLinear]:
        """Return the linears of a block that the recipe quantizes.

        Args:
            block: Index of the block.
        """
        return [linear for linear in self.linears if linear.block == block and linear.name in self.schemes]

    def set_aside(self, module: nn.Module) -> None:
        """Let the weights of a part leave host memory until they are read again.

        Args:
            module: The pipeline's transformer, a block of it, or another component.
        """
        if self.mapped:
            page_out(tensors_of(module))


def load_teacher(model: ModelSource | DiffusionPipeline, recipe: Recipe, *, dtype: torch.dtype | str | None) -> Teacher:
    """Load the model, or take the one given, and check that it can be quantized.

    Args:
        model: A resolved source, or a loaded pipeline.
        recipe: The recipe.
        dtype: Compute dtype; None takes the stored one, or the pipeline's.

    Returns:
        The teacher.

    Raises:
        InvalidInputError: If the model is quantized, has adapters or weights elsewhere, is of an unsupported class, has
            another dtype than the one asked for, or holds values that are not finite (names the tensor).
    """
    mapped = isinstance(model, ModelSource)
    if isinstance(model, ModelSource):
        pipe, name, folder = model.load_pipeline(dtype=dtype), model.name, model.folder
    else:
        pipe = model
        name, folder = _origin(pipe)
    transformer = getattr(pipe, "transformer", None)
    if not isinstance(transformer, nn.Module):
        raise InvalidInputError(f"{type(pipe).__name__} has no transformer; expected a text-to-video pipeline with one")
    linears = tuple(recipe_linears(recipe, transformer))
    _check_state(name, transformer, wanted=parse_dtype(dtype))
    _check_finite(name, transformer, set_aside=mapped)
    return Teacher(
        pipe=pipe,
        name=name,
        folder=folder,
        linears=linears,
        schemes=assign_schemes(recipe, linears),
        dtype=transformer.dtype,
        mapped=mapped,
    )


def _origin(pipe: DiffusionPipeline) -> tuple[str, Path | None]:
    location = str(getattr(pipe, "name_or_path", "") or "")
    if location in embedded.EMBEDDED_NAMES:
        return location, embedded.embedded_folder(location)
    if location and Path(location).is_dir():
        return Path(location).resolve().name, Path(location)
    return (location if HUB_ID.fullmatch(location) else type(pipe).__name__), None


def _check_state(name: str, transformer: nn.Module, *, wanted: torch.dtype | None) -> None:
    if getattr(transformer, "is_quantized", False):
        raise InvalidInputError(f"{name}: its transformer is quantized already; pass the full-precision model")
    if getattr(transformer, "peft_config", None):
        raise InvalidInputError(f"{name}: its transformer has adapters; fuse and unload them first, or unload them")
    for tensor_name, tensor in transformer.state_dict().items():
        if tensor.is_meta:
            raise InvalidInputError(f"{name}: {tensor_name} is offloaded; load the pipeline without offloading")
    if wanted is not None and transformer.dtype != wanted:
        raise InvalidInputError(
            f"{name}: its transformer is loaded in {transformer.dtype}, dtype={wanted} asked for; "
            "load it in that dtype, or leave dtype out"
        )


def _check_finite(name: str, transformer: nn.Module, *, set_aside: bool) -> None:
    for tensor_name, tensor in transformer.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise InvalidInputError(
                f"{name}: {tensor_name} holds {count} values that are NaN or infinite; download or save the model again"
            )
        if set_aside:
            page_out([tensor])
