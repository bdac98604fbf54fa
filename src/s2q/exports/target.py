"""A target of an export: what its format stores of a linear, and how its files are written and read.

What a format cannot store is refused before anything is written, with the linear, the part and the recipe that fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2q.checkpoint import S2QConfig
from s2q.common.components import TRANSFORMERS, full_name, pattern_of
from s2q.common.errors import InvalidInputError
from s2q.core.input_path import PARTS, InputPath
from s2q.core.qparams import RoundedWeight, rounded_values
from s2q.core.schemes import UNIFORM, LinearScheme, PerGroup
from s2q.nn import PackedLinear
from s2q.ops.kronecker import scaled_kronecker
from s2q.transforms.convrot import regular_hadamard
from s2q.transforms.hadamard import hadamard_matrix

_PART_NAMES = {
    "shift": "the shift of its input",
    "scale": "the channel scale of its input, or the signs of its rotation",
    "left": "its Kronecker rotation",
    "right": "its rotation",
    "low_rank": "its low-rank branch",
    "deflates": "a low-rank branch that is removed from the weight",
    "activation_clip": "the clip of its activations",
    "estimator": "its estimator",
    "estimator_frames": "the frame scales of its estimator",
}

WRITER = "s2q export"
"""Name under which files say who quantized them."""

Tensors = Mapping[str, Tensor]
"""Stored tensors of a linear by the last part of their names; the first dimension of each is that of out features."""


@dataclass(frozen=True, kw_only=True)
class LinearForm:
    """A quantized linear of a checkpoint, as its configuration describes it; `dtype` is that of the model's compute.

    Its name is that in its transformer, the component of the pipeline.
    """

    name: str
    in_features: int
    out_features: int
    scheme: LinearScheme
    path: InputPath
    dtype: torch.dtype
    component: str = TRANSFORMERS[0]

    @property
    def full_name(self) -> str:
        """Its name among the linears of all transformers, as errors and `skip` have it."""
        return full_name(self.component, self.name)

    @property
    def rotation(self) -> int | None:
        """The order of its rotation in blocks of channels; None without one."""
        return self.path.right  # type: ignore[no-any-return]

    @property
    def group_size(self) -> int | None:
        """Input channels that share a scale of the weight; None for all."""
        granularity = self.scheme.weight.granularity
        return granularity.group_size if isinstance(granularity, PerGroup) else None

    @property
    def activation_bits(self) -> int | None:
        """Width of its quantized input; None where that is not quantized."""
        return None if self.scheme.activation is None else self.scheme.activation.num_bits


@dataclass(frozen=True, kw_only=True)
class CodedWeight:
    """The weight of a linear as a file has it, for the rotated input.

    Attributes:
        codes: int8 [O, I].
        scale: fp32 [O], or [O, G] of groups.
        group_scale: int8 [O, G], the bytes of groups with a table (`core.codebook`), or None.
        up: fp32 [O, r] of a low-rank branch, or None.
        down: fp32 [r, I] of it, or None.
    """

    codes: Tensor
    scale: Tensor
    group_scale: Tensor | None = None
    up: Tensor | None = None
    down: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class FileFormat:
    """The format of a file with one transformer, in the original layout (`s2q.exports.layout`).

    Attributes:
        suffix: Suffix of the file's name.
        mark: Returns the text that describes a quantized linear to readers.
        plain: Returns the stored form of a tensor outside quantized linears; `is_weight` for weights of linears.
        write: Takes the path, tensors, marks by the name of the linear, and the architecture of the layout.
        read: Returns the tensors and marks of a written file.
        wrote: Returns whether `write` wrote a file.
        misread: Takes a linear, its original name and the architecture. Returns the part that readers would misread,
            or None; such a linear may be left unquantized.
        suffixes: Last parts of the names of a linear's tensors besides weight and bias.
    """

    suffix: str
    mark: Callable[[LinearForm], str]
    plain: Callable[..., Tensor]
    write: Callable[[Path, Mapping[str, Tensor], Mapping[str, str], str], None]
    read: Callable[[Path], tuple[dict[str, Tensor], dict[str, str]]]
    wrote: Callable[[Path], bool]
    misread: Callable[[LinearForm, str, str], str | None] = lambda form, name, architecture: None
    suffixes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Target:
    """A program, or a format that several programs read.

    Attributes:
        name: As `--to` takes it.
        does: What is written, in a few words.
        loading: How the output is loaded, a line of code or the name of a program.
        recipes: Recipes whose checkpoints it stores.
        parts: Parts of an input path (`core.input_path.PARTS`) that it stores.
        obstacle: What else it cannot store of a linear, or None.
        unfit_width: What of the width of a linear it cannot store, or None; such a linear may be left unquantized.
        encode: The tensors that it stores of a linear; without a bias, its own is stored where it has one.
        decode: The weight [O, I] for the unrotated input that a reader computes from the tensors, fp32.
        tolerance: How far weight and bias of a linear may be from s2q's, relative to their largest magnitudes.
        rounding: What the tolerance is for, in a few words.
        stores_codes: Whether it stores codes: rotations have to be those of `s2q.transforms.convrot`, levels uniform or
            those of `levels`.
        levels: Levels of weights that it stores beside uniform ones.
        kind: Name of the format that a linear gets.
        file: How one file of the transformer is written; None where the output is a pipeline folder.
        config: For folders: the `quantization_config` of a transformer whose quantized linears these are, or None.
    """

    name: str
    does: str
    loading: str
    recipes: tuple[str, ...]
    parts: Collection[str]
    obstacle: Callable[[LinearForm], str | None]
    encode: Callable[[PackedLinear, LinearForm], dict[str, Tensor]]
    decode: Callable[[Tensors, LinearForm], Tensor]
    kind: Callable[[LinearForm], str]
    tolerance: Callable[[LinearForm], float] = lambda form: 1e-5
    rounding: str = "fp32 sums in another order"
    stores_codes: bool = True
    levels: Collection[str] = ()
    unfit_width: Callable[[LinearForm], str | None] = lambda form: None
    file: FileFormat | None = None
    config: Callable[[nn.Module, Sequence[LinearForm]], dict[str, Any] | None] = lambda model, forms: None


def encoded(target: Target, layer: PackedLinear, form: LinearForm) -> dict[str, Tensor]:
    """Return all that a target stores of a linear."""
    tensors = target.encode(layer, form)
    return tensors if layer.bias is None or "bias" in tensors else tensors | {"bias": layer.bias}


def linear_forms(model: nn.Module, config: S2QConfig, *, component: str = TRANSFORMERS[0]) -> list[LinearForm]:
    """Describe the quantized linears of a transformer, which may be on the meta device."""
    forms, paths = [], config.layer_paths()
    for name, scheme in config.layer_schemes().items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear), name
        forms.append(
            LinearForm(
                name=name,
                in_features=linear.in_features,
                out_features=linear.out_features,
                scheme=scheme,
                path=paths.get(name, InputPath()),
                dtype=getattr(torch, config.compute_dtype),
                component=component,
            )
        )
    return forms


def check_storable(target: Target, forms: Collection[LinearForm], *, recipe: str) -> None:
    """Refuse linears that a target cannot store; the error names the first, and what to do.

    That is to take another recipe than that of the checkpoint, or to leave linears of such widths unquantized.
    """
    for form in forms:
        if (obstacle := missing_part(target, form)) is not None:
            raise _refusal(target, form, obstacle, recipe=recipe)
    unfit = [form for form in forms if target.unfit_width(form) is not None]
    if unfit:
        patterns = dict.fromkeys(pattern_of(form.full_name) for form in unfit)
        raise stored_unquantized(target, unfit[0], target.unfit_width(unfit[0]), skip=list(patterns))


def stored_unquantized(
    target: Target, form: LinearForm, obstacle: str | None, *, skip: Sequence[str]
) -> InvalidInputError:
    """Build (not raise) the error for a linear that a target stores unquantized only."""
    return InvalidInputError(
        f"{form.full_name}: {target.name} cannot store {obstacle}; quantize the model with skip={list(skip)}, or "
        "export to diffusers"
    )


def missing_part(target: Target, form: LinearForm) -> str | None:
    """Return what a target cannot store of a linear, in words; None if it stores everything."""
    for name, part in PARTS.items():
        if getattr(form.path, name) != part.default and name not in target.parts:
            return _PART_NAMES.get(name, f"the part {name} of its input path")
    if not target.stores_codes:
        return target.obstacle(form)
    if form.path.low_rank is not None and form.path.deflates:
        return "a low-rank branch that is removed from the input"
    activation = form.scheme.activation
    for side, scheme in {"weights": form.scheme.weight, "activations": activation}.items():
        if scheme is not None and scheme.levels not in (UNIFORM, *target.levels):
            return f"the levels {scheme.levels} of its {side}"
    if activation is not None and activation.delta is not None:
        return "differences of its tokens"
    if activation is not None and isinstance(activation.granularity, PerGroup):
        return "groups of its activations"
    return target.obstacle(form)


def check_rotation(layer: PackedLinear, form: LinearForm, target: Target, *, recipe: str) -> None:
    """Refuse a rotation in blocks that is not the matrix which the target's readers apply."""
    if not target.stores_codes or form.rotation is None:
        return
    assert layer.transform_right is not None
    expected = regular_hadamard(form.rotation).to(layer.transform_right)
    if not torch.equal(layer.transform_right, expected):
        raise _refusal(target, form, "its rotation, whose matrix is not ConvRot's", recipe=recipe)


def rotation_matrix(order: int) -> Tensor:
    """Build the rotation of a block of channels, fp64 [n, n], orthonormal and symmetric; n is a power of 2.

    ConvRot's regular matrix for a power of 4, Sylvester's for others, as SDNQ has them.
    """
    if order.bit_length() % 2:
        return regular_hadamard(order)
    matrix = hadamard_matrix(order)
    assert matrix is not None, order
    return matrix / math.sqrt(order)


def unrotated(rows: Tensor, form: LinearForm) -> Tensor:
    """Return rows [..., I] times the rotation of a linear, which is its own inverse, in fp32."""
    if form.rotation is None:
        return rows
    return scaled_kronecker(rows, right=rotation_matrix(form.rotation).float())


def decoded(weight: CodedWeight, form: LinearForm) -> Tensor:
    """Return the weight [O, I] for the unrotated input, fp32."""
    rounded = RoundedWeight(codes=weight.codes, scale=weight.scale, group_scale=weight.group_scale)
    values = rounded_values(rounded, form.scheme.weight)
    if weight.up is not None and weight.down is not None:
        values = values + weight.up @ weight.down
    return unrotated(values, form)


def _refusal(target: Target, form: LinearForm, obstacle: str, *, recipe: str) -> InvalidInputError:
    others = [name for name in target.recipes if name != recipe]
    remedies = [f"quantize the model with {' or '.join(others)}"] if others else []
    if target.stores_codes:
        remedies.append("export to diffusers")
    return InvalidInputError(f"{form.full_name}: {target.name} cannot store {obstacle}; {', or '.join(remedies)}")
