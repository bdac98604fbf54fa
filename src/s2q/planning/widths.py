"""Widths that a device multiplies as integers, and the recipe to take there.

Inputs of 4, 6 and 8 bits have the same int8 products, and their codes are not stored. So 8 bits are as fast and as
small as 4, and more accurate. Only products of NVFP4 blocks gain from inputs of 4 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from s2q.common.processor import instruction_set
from s2q.core.schemes import NVFP4, LinearScheme, PerGroup
from s2q.ops.architectures import nearest_architecture
from s2q.ops.dispatch import FP4_CAPABILITY, MIN_CAPABILITY
from s2q.ops.int_matmul.cpu import is_fast
from s2q.recipes.load import load_recipe
from s2q.recipes.methods import is_for_export, recipe_names
from s2q.recipes.schema import Recipe

WIDTHS = {"w8a8": (8, 8), "w4a8": (4, 8), "w4a6": (4, 6), "w4a4": (4, 4)}
"""Bits of weights and inputs by width."""

RECOMMENDED = ("s2q-table-w4a8", "s2q-plus-w4a8")
"""Recipes of 4-bit weights to take where nothing speaks for another; the second where 8-bit levels have no product."""

WITHOUT_CALIBRATION = "table-w4a8"
"""The one that needs no samples."""

_WIDEST = 8


@dataclass(frozen=True, kw_only=True)
class DeviceProducts:
    """Products of a device.

    Attributes:
        unit: What multiplies integers: "AVX-512 VNNI", "int8 tensor cores".
        integer: Widths with integer products; empty if there are none.
        fp4: Whether NVFP4 weights and inputs have products of 4-bit floating point (backend "fp4").
        is_gpu: Whether its products are those of the GPU kernels, the same for all widths.
    """

    unit: str
    integer: tuple[str, ...]
    fp4: bool = False
    is_gpu: bool = False

    def multiplies(self, scheme: LinearScheme) -> bool:
        """Tell whether linears of a scheme have one of these products; a product of each group of weights is none."""
        if scheme.activation is None:
            return False
        if scheme.simulated:
            return self.fp4 and _is_fp4(scheme)
        if isinstance(scheme.weight.granularity, PerGroup) and not scheme.weight.has_table:
            return False
        if self.is_gpu:
            return bool(self.integer)
        return is_fast(x_bits=scheme.activation.widest, w_bits=scheme.weight.product_bits)


@dataclass(frozen=True, kw_only=True)
class PlannedWidths:
    """The recipe's width among those that the device multiplies (`DeviceProducts`).

    Attributes:
        native: Whether the recipe's block linears have such products; None if their inputs are unquantized.
        same_cost: Recipe of the same method with inputs of 8 bits, the same bytes and the same products, or
            "activations.num_bits=8" for a recipe that is not of the package; None if the inputs have 8 bits.
        recommended: Recipe to take instead; None if there is no better one.
    """

    products: DeviceProducts
    native: bool | None
    same_cost: str | None
    recommended: str | None


def planned_widths(recipe: Recipe, products: DeviceProducts) -> PlannedWidths:
    """Compare the width of a recipe with those that a device multiplies."""
    scheme, for_export = recipe.linear_scheme(), is_for_export(recipe.name)
    native = None if scheme.activation is None else products.multiplies(scheme)
    same_cost = recommended = None
    if products.integer and not for_export and not (native and _is_fp4(scheme)):
        wide = _with_8_bits(scheme) if native else None
        same_cost = _name(recipe) if wide is not None and products.multiplies(wide) else None
        recommended = _recommended(recipe, products)
    return PlannedWidths(products=products, native=native, same_cost=same_cost, recommended=recommended)


def recommended_recipe(device: str) -> str:
    """Return the recipe that calibrates to take on a device: the first of `RECOMMENDED` that it multiplies."""
    products = device_products(device)
    return (products and _first_multiplied(RECOMMENDED, products)) or RECOMMENDED[0]


def device_products(device: str, *, capability: tuple[int, int] | None = None) -> DeviceProducts | None:
    """Return the products of a device; None for a GPU that is not here and whose capability is not given.

    Args:
        device: "cpu", of this machine, or "cuda", "cuda:N".
        capability: Compute capability of a GPU; None asks the device.
    """
    if device == "cpu":
        fast = (name for name, (w_bits, x_bits) in WIDTHS.items() if is_fast(x_bits=x_bits, w_bits=w_bits))
        return DeviceProducts(unit=instruction_set(), integer=tuple(fast))
    capability = capability or _capability(device)
    if capability is None:
        return None
    has_kernels = capability >= MIN_CAPABILITY and nearest_architecture(capability) is not None
    widths = tuple(WIDTHS) if has_kernels else ()
    return DeviceProducts(unit="int8 tensor cores", integer=widths, fp4=capability >= FP4_CAPABILITY, is_gpu=True)


def _capability(device: str) -> tuple[int, int] | None:
    if not torch.cuda.is_available() or (torch.device(device).index or 0) >= torch.cuda.device_count():
        return None
    return (0, 0) if torch.version.hip is not None else torch.cuda.get_device_capability(device)


def _is_fp4(scheme: LinearScheme) -> bool:
    return scheme.activation is not None and scheme.weight.levels == scheme.activation.levels == NVFP4


def _with_8_bits(scheme: LinearScheme) -> LinearScheme | None:
    """The scheme with inputs of 8 bits; None if they have 8."""
    if scheme.activation is None or scheme.activation.num_bits >= _WIDEST:
        return None
    return replace(scheme, activation=replace(scheme.activation, num_bits=_WIDEST))


def _name(recipe: Recipe) -> str:
    """The recipe of the same method with inputs of 8 bits, or what to set."""
    name = f"{recipe.name.rpartition('-')[0]}-w{recipe.weights.num_bits}a{_WIDEST}"
    if {recipe.name, name} <= set(recipe_names()) and load_recipe(recipe.name) == recipe:
        return name
    return f"activations.num_bits={_WIDEST}"


def _recommended(recipe: Recipe, products: DeviceProducts) -> str | None:
    """The recommended recipe of 4-bit weights that the device multiplies; none instead of wider weights."""
    if recipe.weights.num_bits > WIDTHS["w4a8"][0]:
        return None
    names = RECOMMENDED if recipe.calibrates else (WITHOUT_CALIBRATION, *RECOMMENDED)
    best = _first_multiplied(names, products)
    return None if recipe.name == best else best


def _first_multiplied(names: Sequence[str], products: DeviceProducts) -> str | None:
    return next((name for name in names if products.multiplies(load_recipe(name).linear_scheme())), None)
