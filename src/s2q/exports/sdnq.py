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

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from s2q.core.packing import unpack_codes
from s2q.core.qparams import dequantize_weight
from s2q.exports.target import LinearForm, Target, Tensors, unrotated
from s2q.nn import PackedLinear
from s2q.transforms.convrot import ORDERS

_FORMAT_VERSION = "0.2.8"
"""Of the package that this was compared with."""

_MULTIPLE, _LEAST = 16, 32  # in and out features of a product of integers; a reader computes others without quantizing


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
    if form.activation_bits is not None and (min(sides) < _LEAST or any(side % _MULTIPLE for side in sides)):
        return (
            f"quantized activations of a linear of {sides[0]} x {sides[1]} features, which its readers do not quantize"
        )
    return None


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


def _decode(tensors: Tensors, form: LinearForm) -> Tensor:
    transposed, shape = form.activation_bits is not None, (form.out_features, form.in_features)
    codes, scale = tensors["weight"], tensors["scale"]
    if form.scheme.weight.num_bits <= 4:
        codes = unpack_codes(codes.reshape(shape[0], -1), num_bits=4, in_features=shape[1])
    elif transposed:
        codes, scale = codes.t(), scale.t()
    scale = scale.reshape(shape[0], -1)
    weight = dequantize_weight(codes.reshape(shape), scale if form.group_size is not None else scale[:, 0])
    if "svd_up" in tensors:
        up, down = tensors["svd_up"], tensors["svd_down"]
        weight = weight + (up.t() @ down.t() if transposed else up @ down)
    return unrotated(weight, form)


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
    decode=_decode,
    kind=_kind,
    config=_config,
)
