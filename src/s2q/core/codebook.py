"""Levels that are not evenly spaced: Lloyd-Max codebooks for one coordinate of a random direction.

A vector of d values that a random rotation has turned, over its root mean square, is √d times a random point of the
unit sphere. Whatever the vector was, each coordinate z of that point has the density

    f(z) ∝ (1 - z²)^((d - 3) / 2),    |z| ≤ 1,

and √d · z is N(0, 1) for large d. The levels of least squared error lie at the means of their cells, the boundaries
halfway between levels (Max, "Quantizing for Minimum Distortion", 1960; Lloyd, "Least Squares Quantization in PCM",
1982):

    l_i = E[z | b_{i-1} < z < b_i],    b_i = (l_i + l_{i+1}) / 2

So d and the number of bits alone say which codebook to use (OrbitQuant, Lee et al., arXiv 2607.02461, section 3.2).

Example, d large: ±0.7979 for 1 bit; ±0.4528 and ±1.5104 for 2 bits.

Integer kernels multiply levels that are whole numbers of 8 bits. "lloyd_max_int8" rounds a codebook to them, its
outermost level to 127. "table" has a scale Δ [O] of each row in fp32 and one byte g [O, G] of each group: its lowest
two bits name one of four tables, and the others are a scale s = g >> 2 with a sign, -32 to 31. What is multiplied is

    v = ⌊(l · s + 16) / 32⌋,    w = Δ · v

The levels l of `TABLES` are not symmetric: the sign of s turns a group's longer tail to their longer side. The four
differ in how close to the ends their levels are. "fp8_table" stores the same, of `FP8_TABLE_NUMBER` and `FP8_SCALES`
alone: what other programs read as levels l / 32 with a scale of 8 bits (e4m3) of each group.

Example: l = 127 with s = 31 is v = 123, with s = -16 it is v = -63.
"""

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from s2q.common.errors import InvalidInputError
from s2q.core.fp4 import E2M1_LEVELS
from s2q.core.packing import NIBBLE_ZERO, NIBBLES
from s2q.core.schemes import LLOYD_MAX_INT8, UNIFORM, QuantScheme, num_groups

_Array = NDArray[np.float64]

TABLES = (
    (-115, -81, -67, -51, -38, -26, -15, -4, 8, 20, 35, 51, 64, 79, 108, 127),
    (-110, -84, -69, -55, -42, -28, -16, -3, 8, 19, 31, 45, 62, 89, 107, 127),
    (-114, -91, -70, -55, -42, -30, -18, -5, 10, 26, 41, 56, 70, 84, 106, 127),
    (-111, -92, -62, -48, -36, -23, -11, 1, 13, 24, 36, 50, 67, 85, 104, 127),
)
"""Levels of least squared error for groups of 16 values of a normal distribution whose table and s are searched as in
`s2q.rounding.table`: Lloyd's iteration over all of them."""

FP8_TABLE_NUMBER = 2
"""Place in `TABLES` of the one that has the least squared error if scales are positive."""

FP8_SCALES = (*range(17), *range(18, 31, 2))
"""Scales s of 8-bit floating point (e4m3): whole numbers of 4 significant bits."""

MAX_LEVEL = 127
"""Largest magnitude of an int8 level."""

TABLE_BITS, SCALE_BITS = 2, 5
"""Of a group's byte: those that name the table, and the shift that a scale is followed by."""

_MANY_VALUES = 2**14  # below, making the table of cells takes longer than it saves

_MAX_STEPS = 50
_TOLERANCE = 1e-9  # of the last step; the method is Newton's, so what is left after it is rounding


@cache
def levels_of(scheme: QuantScheme, in_features: int, *, device: torch.device | str = "cpu") -> Tensor | None:
    """Return the levels of the codes of a weight or an activation in units of its scale, fp32 [2^N], rising.

    None for uniform levels, where a code is its level. The dimension d is I, or the group size. Levels of int8 values
    are whole numbers. The formats of `core.fp4` have those of E2M1. All callers of a device share one tensor.
    """
    if scheme.levels == UNIFORM:
        return None
    assert not scheme.has_table, scheme
    levels: tuple[float, ...] = E2M1_LEVELS
    if not scheme.is_fp4:
        levels = lloyd_max_levels(scheme.num_bits, in_features // num_groups(scheme, in_features))
    if scheme.levels == LLOYD_MAX_INT8:
        levels = tuple(round(level / levels[-1] * MAX_LEVEL) for level in levels)
    with torch.inference_mode(False):  # tensors of that mode cannot be used outside of it
        return torch.tensor(levels, dtype=torch.float32, device=device)


def level_unit(scheme: QuantScheme, in_features: int) -> float:
    """Return the size of one unit of `levels_of`, Lloyd-Max, in root mean squares of what is quantized."""
    if scheme.levels != LLOYD_MAX_INT8:
        return 1.0
    return lloyd_max_levels(scheme.num_bits, in_features // num_groups(scheme, in_features))[-1] / MAX_LEVEL


@cache
def nibble_levels(scheme: QuantScheme, in_features: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Return the int8 levels of packed codes by their nibble, int8 [16]; 0 where no code of N bits has the nibble.

    With a table [64], those of the four tables one after the other. All callers of a device share one tensor.
    """
    with torch.inference_mode(False):
        if scheme.has_table:
            return table_levels(device).flatten()
        levels = levels_of(scheme, in_features, device=device)
        assert levels is not None
        assert scheme.has_int8_levels, scheme
        first = NIBBLE_ZERO - len(levels) // 2
        nibbles = torch.zeros(NIBBLES, dtype=torch.int8, device=device)
        nibbles[first : first + len(levels)] = levels.to(torch.int8)
        return nibbles


@cache
def table_levels(device: torch.device | str = "cpu") -> Tensor:
    """Return `TABLES` as int8 [4, 16]; all callers of a device share one tensor."""
    with torch.inference_mode(False):
        return torch.tensor(TABLES, dtype=torch.int8, device=device)


def table_and_scale(group_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of the table, 0 to 3, and the scale s of each group's byte g, int8."""
    return group_scale & ((1 << TABLE_BITS) - 1), group_scale >> TABLE_BITS


def scaled_levels(levels: Tensor, scale: Tensor) -> Tensor:
    """Return v = ⌊(l · s + 16) / 32⌋, int16, of whole levels and scales, which broadcast."""
    half = 1 << (SCALE_BITS - 1)
    return (levels.to(torch.int16) * scale.to(torch.int16)).add_(half).bitwise_right_shift_(SCALE_BITS)


def group_levels(group_scale: Tensor) -> Tensor:
    """Return v of the sixteen codes of each group, int16 [..., 16], of its byte g, int8 [...]; v falls where s < 0."""
    table, scale = table_and_scale(group_scale)
    return scaled_levels(table_levels(group_scale.device)[table.int()], scale.unsqueeze(-1))


def nearest_level(ratio: Tensor, levels: Tensor) -> Tensor:
    """Find the nearest level (fp32 [2^N], rising, N at least 2) of each fp32 value over its scale.

    Returns its index, int32, same shape: the lower one of two that are equally near, the last one for NaN.
    """
    bounds = (levels[1:] + levels[:-1]) / 2
    if ratio.device.type != "cpu" or ratio.numel() < _MANY_VALUES or torch.compiler.is_compiling():
        return torch.bucketize(ratio.contiguous(), bounds, out_int32=True)
    return _bucketize(ratio.flatten(), bounds).view(ratio.shape)


def _bucketize(values: Tensor, bounds: Tensor) -> Tensor:
    """Return ``torch.bucketize(values, bounds)`` of fp32 [n] and rising fp32 [b], which searches value by value.

    The range of the bounds is cut into even cells, so narrow that each holds one bound at most: the number of bounds in
    the cells before it, and one comparison, tell a value's place.
    """
    per_unit = 2 / bounds.diff().min()
    cells = int((bounds[-1] - bounds[0]) * per_unit) + 1

    def cell(of: Tensor) -> Tensor:  # rises with the value, rounding or not
        return of.sub(bounds[0]).mul_(per_unit).clamp_(0, cells).nan_to_num_(nan=cells).int()

    before = torch.bincount(cell(bounds) + 1, minlength=cells + 1).cumsum(0).int()
    following = torch.cat([bounds, bounds.new_tensor([torch.inf])])
    place = before.index_select(0, cell(values))
    return place.add_(values > following.index_select(0, place))


@cache
def lloyd_max_levels(num_bits: int, dimension: int) -> tuple[float, ...]:
    """Compute the 2^N levels of least squared error for √d times a coordinate of a random point of the unit sphere.

    They are symmetric; 0 is not among them. InvalidInputError if d is below 2: one value to a scale.
    """
    if dimension < 2:
        raise InvalidInputError(
            f"lloyd_max levels: {dimension} value to a scale; expected at least 2, use levels=uniform"
        )
    positive = _positive_levels(2 ** (num_bits - 1), dimension) * dimension**0.5
    return (*(-positive[::-1]).tolist(), *positive.tolist())


def _positive_levels(count: int, dimension: int) -> _Array:
    """Solve for the positive half of the levels of z by Newton's method on l_i - E[z | cell i] = 0, [count]."""
    levels = _first_guess(count, dimension)
    for _ in range(_MAX_STEPS):
        inner = (levels[1:] + levels[:-1]) / 2
        mass, moment = _beyond(np.concatenate([[0.0], inner, [1.0]]), dimension)
        mass, moment = mass[:-1] - mass[1:], moment[:-1] - moment[1:]
        means = moment / mass
        density = _density(inner, dimension)
        above = density * (inner - means[:-1]) / mass[:-1] / 2  # ∂ mean_i / ∂ l_{i+1}, through the boundary b_i
        below = density * (means[1:] - inner) / mass[1:] / 2  # ∂ mean_i / ∂ l_{i-1}
        slope = np.pad(above, (0, 1)) + np.pad(below, (1, 0))
        jacobian = np.diag(1 - slope) - np.diag(above, 1) - np.diag(below, -1)
        step = np.linalg.solve(jacobian, levels - means)
        levels = levels - step
        if float(np.abs(step).max()) * dimension**0.5 < _TOLERANCE:
            assert np.all(np.diff(levels, prepend=0) > 0), (count, dimension)
            return levels
    raise AssertionError(f"no convergence for {count} levels a side in {dimension} dimensions")


def _first_guess(count: int, dimension: int) -> _Array:
    """Levels as for very many of them: quantiles of a density in proportion to f^⅓, which is that of d / 3 + 2."""
    from scipy.special import betaincinv

    beyond = 1 - (np.arange(count) + 0.5) / count
    guess: _Array = np.sqrt(1 - betaincinv((dimension / 3 + 1) / 2, 0.5, beyond))
    return guess


def _beyond(bounds: _Array, dimension: int) -> tuple[_Array, _Array]:
    """Return P(|z| > b) and E[|z|; |z| > b] of each bound."""
    from scipy.special import betainc

    rest = 1 - bounds**2
    mass: _Array = betainc((dimension - 1) / 2, 0.5, rest)
    return mass, 2 * _constant(dimension) / (dimension - 1) * rest ** ((dimension - 1) / 2)


def _density(z: _Array, dimension: int) -> _Array:
    """Return the density of |z|."""
    density: _Array = 2 * _constant(dimension) * (1 - z**2) ** ((dimension - 3) / 2)
    return density


def _constant(dimension: int) -> float:
    """Return f(0) = Γ(d/2) / (√π · Γ((d - 1)/2))."""
    from scipy.special import gammaln

    return float(np.exp(gammaln(dimension / 2) - gammaln((dimension - 1) / 2)) / np.sqrt(np.pi))
