"""SDNQ's format, which diffusers loads where the package sdnq is installed (`quant_method: sdnq`, sdnq 0.2.8).

    y = (codes_x · codes_wᵀ) Δ_x Δ_w + b + (x H) · down · up        codes_x, Δ_x from x H, dynamic, per token, 8 bits

- `weight`: up to 4 bits uint8 [O · I / 2], codes + 8, the first in the low nibble; above int8 [O, I], or [I, O] where
  the input is quantized;
- `scale`: fp32 [O, 1], or [1, O] beside int8 [I, O]; of groups [O, G, 1];
- `svd_up` [O, r] and `svd_down` [r, I], both transposed where the input is quantized, read the rotated, not quantized
  input; a reader computes them in fp32, and so they are stored.

A call with fewer than 32 rows is computed without quantizing its input. Linears that are alike share the keys of the
configuration; others have theirs in `modules_quant_config`.

Shapes: `O/I` out/in features, `G` groups, `r` rank.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from s2q.common.errors import InvalidInputError
from s2q.core.packing import unpack_codes
from s2q.exports.source import SourceFormat, coded_form
from s2q.exports.target import CodedWeight, LinearForm, Target, Tensors, decoded, unrotated
from s2q.nn import PackedLinear
from s2q.transforms.convrot import ORDERS

_FORMAT_VERSION = "0.2.8"
"""Of the package that this was compared with."""

_MULTIPLE, _LEAST = 16, 32  # in and out features of a product of integers; a reader computes others without quantizing
_BITS = {"int4": 4, "int8": 8}
_SECOND_SCALES = ("scale_2", "scale_zero_point", "zero_point_scale", "zero_point_2")
_SIZE = re.compile(r"(?P<kind>u?int)?(?P<bits>\d+)")  # in "minimum_6bit", "uint4"


def _obstacle(form: LinearForm) -> str | None:
    bits, rotation = form.activation_bits, form.rotation
    if bits not in (None, 8):
        return f"activations of {bits} bits, but of 8 or unquantized"
    if rotation is not None and rotation not in ORDERS:
        return f"a rotation in blocks of {rotation} channels"
    if bits is not None and form.group_size is not None:
        return "groups of weights beside quantized activations, which its readers round again"
    return None


def _unfit_width(form: LinearForm) -> str | None:
    if form.in_features % 2 and form.scheme.weight.num_bits <= 4:
        return f"an odd number of input channels, {form.in_features}, in 4 bits"
    sides = (form.in_features, form.out_features)
    if form.activation_bits is not None and not _multiplies(*sides):
        return (
            f"quantized activations of a linear of {sides[0]} x {sides[1]} features, which its readers do not quantize"
        )
    return None


def _multiplies(*sides: int) -> bool:
    return min(sides) >= _LEAST and not any(side % _MULTIPLE for side in sides)


def _encode(layer: PackedLinear, form: LinearForm) -> dict[str, Tensor]:
    transposed, packed = form.activation_bits is not None, form.scheme.weight.num_bits <= 4
    scale = layer.weight_scale.reshape(form.out_features, -1, *([1] if form.group_size is not None else []))
    if packed:
        tensors = {"weight": layer.packed_weight.flatten(), "scale": scale}
    elif transposed:
        tensors = {"weight": layer.codes().t(), "scale": scale.t()}
    else:
        tensors = {"weight": layer.codes(), "scale": scale}
        if form.group_size is not None:
            tensors["weight"] = layer.codes().reshape(form.out_features, -1, form.group_size)
    if layer.low_rank_basis is not None and layer.low_rank_weight is not None:
        up, down = layer.low_rank_weight.float(), unrotated(layer.low_rank_basis.float().t(), form)
        tensors |= {"svd_up": up.t() if transposed else up, "svd_down": down.t() if transposed else down}
    return tensors


def _weight(tensors: Tensors, form: LinearForm) -> CodedWeight:
    transposed, shape = form.activation_bits is not None, (form.out_features, form.in_features)
    codes, scale = tensors["weight"], tensors["scale"].float()
    if form.scheme.weight.num_bits <= 4:
        codes = unpack_codes(codes.reshape(shape[0], -1), num_bits=4, in_features=shape[1])
    elif transposed and form.group_size is None:
        codes, scale = codes.t(), scale.t()
    scale = scale.reshape(-1, 1).expand(shape[0], 1) if scale.numel() == 1 else scale.reshape(shape[0], -1)
    up, down = (None if tensor is None else tensor.float() for tensor in map(tensors.get, ("svd_up", "svd_down")))
    if transposed and up is not None and down is not None:
        up, down = up.t(), down.t()
    scale = scale[:, 0] if form.group_size is None else scale
    return CodedWeight(codes=codes.reshape(shape), scale=scale, up=up, down=down)


def _config(model: nn.Module, forms: Sequence[LinearForm]) -> dict[str, Any]:
    quantized = {form.name for form in forms}
    options = {form.name: _options(form) for form in forms}
    usual = dict(Counter(tuple(option.items()) for option in options.values()).most_common(1)[0][0])
    others = {f".{name}.": option for name, option in options.items() if option != usual}
    kept = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in quantized]
    return {
        "quant_method": "sdnq",
        "sdnq_version": _FORMAT_VERSION,
        **usual,
        "is_integer": True,
        "is_unsigned": False,
        "dequantize_fp32": True,
        "quantized_matmul_dtype": "int8",
        "add_skip_keys": False,
        "minimum_allowed_numel": 0,
        "minimum_allowed_channel_size": 0,
        "modules_to_not_convert": [f".{name}." for name in kept],
        "modules_dtype_dict": {},
        "modules_quant_config": others,
    }


def _options(form: LinearForm) -> dict[str, Any]:
    return {
        "weights_dtype": _kind(form),
        "group_size": form.group_size or -1,
        "use_quantized_matmul": form.activation_bits is not None,
        "use_hadamard": form.rotation is not None,
        "hadamard_group_size": form.rotation or ORDERS[-1],
        "use_svd": form.path.low_rank is not None,
        "svd_rank": form.path.low_rank or 32,
    }


def linear_options(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return what a `quantization_config` says of a linear, by full name: its own keys and dtype before those of all.

    A pattern of names is a beginning of the weight's name after a point, the name, a part of it, or has asterisks.
    """
    weight, options = f"{name}.weight", dict(config)
    options |= next(
        (own for pattern, own in _mapping(config, "modules_quant_config").items() if _names(pattern, weight)), {}
    )
    dtype = str(options.get("weights_dtype"))
    for wanted, patterns in _mapping(config, "modules_dtype_dict").items():
        if any(_names(pattern, weight) for pattern in patterns):
            options["weights_dtype"] = _widened(dtype, wanted.lower())
            break
    if any(_names(pattern, weight) for pattern in config.get("modules_to_not_use_matmul") or ()):
        options["use_quantized_matmul"] = False
    return options


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    return config.get(key) or {}


def _names(pattern: str, weight: str) -> bool:
    if pattern.startswith("."):
        return weight.startswith(pattern[1:])
    return weight == pattern or pattern in weight.split(".") or ("*" in pattern and fnmatchcase(weight, f"{pattern}*"))


def _widened(dtype: str, wanted: str) -> str:
    """The dtype of a linear that is to have another one, "int8", or a minimum of bits, "minimum_6bit"."""
    if not (wanted.startswith("minimum") or wanted.endswith(("bit", "bits"))):
        return wanted
    given, least = _SIZE.search(dtype), _SIZE.search(wanted)
    if given is None or least is None or int(given["bits"]) >= int(least["bits"]):
        return dtype
    return f"{'uint' if least['kind'] == 'uint' or int(least['bits']) <= 4 else 'int'}{least['bits']}"


def _form(name: str, linear: nn.Linear, tensors: Tensors, options: Mapping[str, Any], dtype: torch.dtype) -> LinearForm:
    """Describe a linear by what the configuration says of it; see `SourceFormat`."""
    kind, product = str(options.get("weights_dtype")), bool(options.get("use_quantized_matmul"))
    if kind not in _BITS or "zero_point" in tensors:
        zeros = " and zero points" if "zero_point" in tensors else ""
        raise InvalidInputError(f"{kind} weights{zeros}")
    if options.get("use_codebook") or options.get("use_codebook_scale"):
        raise InvalidInputError("codebooks")
    if second := [name for name in _SECOND_SCALES if name in tensors]:
        raise InvalidInputError(f"scales that are quantized themselves ({second[0]})")
    activations = options.get("quantized_matmul_dtype") or "int8"
    if product and activations != "int8":
        raise InvalidInputError(f"activations in {activations}")
    sides = (linear.in_features, linear.out_features)
    product = product and _multiplies(*sides)
    order = _hadamard_order(linear.in_features, int(options.get("hadamard_group_size") or ORDERS[-1]))
    branch = tensors.get("svd_down")
    form = coded_form(
        name,
        linear,
        num_bits=_BITS[kind],
        activation_bits=8 if product else None,
        dtype=dtype,
        groups=_groups(tensors["scale"], linear, transposed=product and kind == "int8"),
        rotation=order if options.get("use_hadamard") and order >= ORDERS[0] else None,
        rank=None if branch is None else branch.numel() // linear.in_features,
    )
    _check_shapes(tensors, form)
    return form


def _hadamard_order(in_features: int, largest: int) -> int:
    """The largest power of 2, up to one that is given, that divides a width."""
    order = 1
    while order < largest and in_features % (2 * order) == 0:
        order *= 2
    return order


def _groups(scale: Tensor, linear: nn.Linear, *, transposed: bool) -> int:
    """The number of scales of a row, from the shape of all."""
    shape, rows = tuple(scale.shape), linear.out_features
    if scale.numel() == 1 or shape == ((1, rows) if transposed else (rows, 1)):
        return 1
    if len(shape) != 3 or shape[0] != rows or shape[2] != 1 or linear.in_features % shape[1]:
        raise InvalidInputError(f"scales of shape {list(shape)}")
    return shape[1]


def _check_shapes(tensors: Tensors, form: LinearForm) -> None:
    """Refuse tensors that have not the shapes and dtypes of `_encode`."""
    rows, columns, packed = form.out_features, form.in_features, form.scheme.weight.num_bits <= 4
    weight, transposed = tensors["weight"], form.activation_bits is not None
    shape: tuple[int, ...] = (rows * columns // 2,) if packed else (rows, columns)
    if not packed and form.group_size is not None:
        shape = (rows, columns // form.group_size, form.group_size)
    elif not packed and transposed:
        shape = (columns, rows)
    expected: dict[str, tuple[torch.dtype | None, tuple[int, ...]]]
    expected = {"weight": (torch.uint8 if packed else torch.int8, shape)}
    if (rank := form.path.low_rank) is not None:
        step = -1 if transposed else 1
        expected |= {"svd_up": (None, (rows, rank)[::step]), "svd_down": (None, (rank, columns)[::step])}
    for part, (dtype, sizes) in expected.items():
        tensor = tensors.get(part, weight.new_empty(0))
        if tuple(tensor.shape) != sizes or tensor.dtype != (dtype or tensor.dtype):
            raise InvalidInputError(f"{part} {tensor.dtype} {list(tensor.shape)}, not {list(sizes)}")


def _kind(form: LinearForm) -> str:
    return "int4" if form.scheme.weight.num_bits <= 4 else "int8"


SDNQ = Target(
    name="sdnq",
    does="4- or 8-bit weights that diffusers loads with the package sdnq",
    loading="DiffusionPipeline.from_pretrained(OUT), with the package sdnq installed",
    recipes=("s2q-export-w4a8", "s2q-export-branch-w4a8", "s2q-export-w8a8"),
    parts=frozenset({"right", "low_rank", "deflates"}),
    obstacle=_obstacle,
    unfit_width=_unfit_width,
    encode=_encode,
    decode=lambda tensors, form: decoded(_weight(tensors, form), form),
    kind=_kind,
    config=_config,
)
SDNQ_FORMAT = SourceFormat(
    name="sdnq",
    version=_FORMAT_VERSION,
    remedy="with weights_dtype int4 or int8 and no codebook in sdnq",
    form=_form,
    weight=_weight,
    few_rows_unquantized=True,
)
