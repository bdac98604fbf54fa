"""ComfyUI's quantized safetensors (comfy-kitchen 0.2.40): one file, published names, a JSON mark for each linear.

- 4-bit weights, 8-bit inputs: `asym_w4a8_int8`, `weight` int8 [O, I/2], codes + 8, with `weight_s_channel` Δ [O] and
  `weight_s_rel` fp32 [O, 1], ones: all of a row is one group;
- the same with the levels "fp8_table": `weight_s_rel` s in 8-bit floating point (e4m3) [O, G], and `weight_codebook` c
  fp32 [16]. A weight is Δ · v, v = round(c[code + 8] · s);
- 4-bit weights, 4-bit inputs: `convrot_w4a4`, `weight` int8 [O, I/2], two's complement, and `weight_scale` [O];
- 8-bit weights, 8-bit inputs: `int8_tensorwise`, `weight` int8 [O, I] and `weight_scale` [O, 1];
- inputs that are not quantized: the same with `full_precision_matrix_mult`; codes of 4 bits take a byte.

The even input channel is in the low nibble. Formats of 4 bits always rotate. No format has a branch or a channel scale.

Shapes: `O/I` out/in features, `G` groups.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from s2q.common.errors import InvalidInputError, S2QError, short_repr
from s2q.common.headers import read_header
from s2q.core.codebook import FP8_SCALES, FP8_TABLE_NUMBER, SCALE_BITS, TABLE_BITS, TABLES, table_and_scale
from s2q.core.packing import unpack_codes
from s2q.core.qparams import dequantize_weight
from s2q.core.schemes import FP8_TABLE, UNIFORM
from s2q.exports.source import SourceFormat, coded_form
from s2q.exports.target import WRITER, CodedWeight, FileFormat, LinearForm, Target, Tensors, unrotated
from s2q.nn import PackedLinear
from s2q.transforms.convrot import ORDERS

logger = logging.getLogger(__name__)

_FORMAT_VERSION = "0.2.40"
"""Of comfy-kitchen, which this was compared with."""

_W4A8, _W4A4, _INT8 = "asym_w4a8_int8", "convrot_w4a4", "int8_tensorwise"
_SMALLEST_ORDER = {_W4A8: 4, _W4A4: 16, _INT8: 4}
_MULTIPLE = {_W4A8: 16, _W4A4: 64, _INT8: 1}
_TWOS_COMPLEMENT = 0x88  # the bit that tells codes + 8 from two's complement, of both nibbles
_MEASURED = {"ltxv": "transformer_blocks.0.attn2.to_k"}
"""By architecture, the linear from the shape of whose weight ComfyUI takes how wide its input is."""
_MARK = "comfy_quant"
_HEADER_MARKS = "_quantization_metadata"
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""Before the names of a transformer in files of several components, and of some writers."""
_METADATA = {"quantized_by": WRITER}
_CODEBOOK = "weight_codebook"
_HALF_UP = 2.0**-10
"""Added to the levels l of a codebook: l · s / 32 of two whole numbers is rounded up then, as that of s2q."""
_BOOK = "codebook is that of s2q"
"""In marks: whether the file has such levels for a linear that has some."""
_GROUP = 16
"""Channels of a group where the mark has no `group_size`."""
_RELATIVE = (torch.float32, torch.float8_e4m3fn)
_PARTS = {_W4A8: ("weight_s_rel", "weight_s_channel"), _W4A4: ("weight_scale",), _INT8: ("weight_scale",)}
_SCALES = (*_PARTS[_INT8], *_PARTS[_W4A8])
_PRODUCTS = {"int4": 4, "int8": 8}
"""Bits of activations by `linear_dtype`."""


def _obstacle(form: LinearForm) -> str | None:
    bits, kind, rotation = form.activation_bits, _kind(form), form.rotation
    if bits not in (None, 4, 8) or (bits == 4 and form.scheme.weight.num_bits > 4):
        return f"activations of {bits} bits beside weights of {form.scheme.weight.num_bits}"
    if form.group_size is not None and not (form.scheme.weight.has_table and kind == _W4A8):
        table = f", or groups with the levels {FP8_TABLE}" if kind == _W4A8 else ""
        return f"groups of {form.group_size} of weights, but a scale for each row{table}"
    if rotation is None and kind != _INT8:
        return f"unrotated inputs: {kind} always rotates"
    if rotation is not None and rotation not in ORDERS:
        return f"a rotation in blocks of {rotation} channels, but of {', '.join(map(str, ORDERS))}"
    return None


def _unfit_width(form: LinearForm) -> str | None:
    kind = _kind(form)
    if form.group_size is not None and (not _is_group(form.group_size) or form.group_size == form.in_features):
        return f"groups of {form.group_size} of {form.in_features} channels, but several of 4, 8 or a multiple of 16"
    if form.in_features % _MULTIPLE[kind]:
        return f"{form.in_features} input channels, no multiple of {_MULTIPLE[kind]}, as {kind}"
    if form.rotation is not None and form.rotation < _SMALLEST_ORDER[kind]:
        return f"a rotation in blocks of {form.rotation} channels as {kind}, but of {_SMALLEST_ORDER[kind]} or more"
    return None


def _misread(form: LinearForm, name: str, architecture: str) -> str | None:
    if name == _MEASURED.get(architecture) and _kind(form) != _INT8:
        return "its weights in 4 bits, two to a byte: its reader takes the width of the text from their shape"
    return None


def _kind(form: LinearForm) -> str:
    if form.activation_bits is None or form.scheme.weight.num_bits > 4:
        return _INT8
    return _W4A4 if form.activation_bits == 4 else _W4A8


def _mark(form: LinearForm) -> str:
    content: dict[str, Any] = {"format": _kind(form)}
    if _kind(form) == _W4A8:
        content["group_size"] = form.group_size or form.in_features
    if _kind(form) == _INT8:
        content["convrot"] = form.rotation is not None
    if form.rotation is not None:
        content["convrot_groupsize"] = form.rotation
    if form.activation_bits is None:
        content["full_precision_matrix_mult"] = True
    return json.dumps(content)


def _encode(layer: PackedLinear, form: LinearForm) -> dict[str, Tensor]:
    kind, scale = _kind(form), layer.weight_scale
    if kind == _W4A8:
        relative = torch.ones_like(scale).unsqueeze(1)
        if layer.weight_group_scale is not None:
            relative = table_and_scale(layer.weight_group_scale)[1].to(torch.float8_e4m3fn)
        return {"weight": layer.packed_weight.view(torch.int8), "weight_s_channel": scale, "weight_s_rel": relative}
    if kind == _W4A4:
        return {"weight": (layer.packed_weight ^ _TWOS_COMPLEMENT).view(torch.int8), "weight_scale": scale}
    return {"weight": layer.codes(), "weight_scale": scale.unsqueeze(1)}


def _codebook() -> Tensor:
    """Return the levels that a linear with groups has in a file, fp32 [16]."""
    return (torch.tensor(TABLES[FP8_TABLE_NUMBER], dtype=torch.float32) + _HALF_UP) / 2**SCALE_BITS


def _is_group(size: int) -> bool:
    return size in (4, 8) or size % 16 == 0


def _codes(tensors: Tensors, form: LinearForm) -> Tensor:
    """Return the codes of a linear, int8 [O, I]."""
    codes = tensors["weight"]
    if codes.shape[1] == form.in_features:
        return codes
    packed = codes.view(torch.uint8)
    packed = packed if "weight_s_rel" in tensors else packed ^ _TWOS_COMPLEMENT
    return unpack_codes(packed, num_bits=4, in_features=form.in_features)


def _scale(tensors: Tensors) -> Tensor:
    return tensors["weight_s_channel" if "weight_s_rel" in tensors else "weight_scale"].float().flatten()


def _weight(tensors: Tensors, form: LinearForm) -> CodedWeight:
    group_scale = None
    if form.scheme.weight.has_table:
        group_scale = (tensors["weight_s_rel"].float().to(torch.int8) << TABLE_BITS) | FP8_TABLE_NUMBER
    return CodedWeight(codes=_codes(tensors, form), scale=_scale(tensors), group_scale=group_scale)


def _decode(tensors: Tensors, form: LinearForm) -> Tensor:
    """Return the weight as comfy-kitchen computes it."""
    values, relative = _codes(tensors, form), tensors.get("weight_s_rel")
    if relative is not None:
        levels = _codebook()[values.int() + 8] if form.scheme.weight.has_table else values.float()
        grouped = levels.view(*relative.shape, -1) * relative.float().unsqueeze(-1)
        values = grouped.round_().clamp_(-127, 127).flatten(1).to(torch.int8)
    return unrotated(dequantize_weight(values, _scale(tensors)), form)


def _form(name: str, linear: nn.Linear, tensors: Tensors, mark: Mapping[str, Any], dtype: torch.dtype) -> LinearForm:
    """Describe a linear by its mark; see `SourceFormat`. Codes of 4 bits that take a byte are those again."""
    kind, rows, columns, weight = mark.get("format"), linear.out_features, linear.in_features, tensors["weight"]
    if kind not in _SMALLEST_ORDER:
        raise InvalidInputError(f"format {short_repr(kind)}")
    width = columns if kind == _INT8 else columns // 2
    if (weight.dtype, tuple(weight.shape)) != (torch.int8, (rows, width)):
        raise InvalidInputError(f"{kind} weights {weight.dtype} {list(weight.shape)}, not torch.int8 {[rows, width]}")
    scale = tensors.get("weight_s_channel" if kind == _W4A8 else "weight_scale")
    if scale is None or scale.numel() != rows:
        raise InvalidInputError(f"{kind} scales of shape {None if scale is None else list(scale.shape)}")
    if stray := sorted(tensors.keys() & set(_SCALES) - set(_PARTS[kind])):
        raise InvalidInputError(f"{stray[0]}, which {kind} does not have")
    order = mark.get("convrot_groupsize", ORDERS[-1]) if kind != _INT8 or mark.get("convrot") else None
    if order is not None and (order not in ORDERS or columns % order):
        raise InvalidInputError(f"a rotation in blocks of {short_repr(order)} of {columns} channels")
    groups = _groups(tensors.get("weight_s_rel"), mark, rows, columns) if kind == _W4A8 else 1
    if groups == 1 and _BOOK in mark:
        raise InvalidInputError(f"{_CODEBOOK}, which {kind} has with groups alone")
    product = mark.get("linear_dtype", "int4")
    if kind == _W4A4 and product not in _PRODUCTS:
        raise InvalidInputError(f"activations in {short_repr(product)}")
    is_float, is_narrow = bool(mark.get("full_precision_matrix_mult")), kind != _INT8
    if is_float and kind == _INT8:
        is_narrow = bool(((weight >= -8) & (weight < 8)).all())
    return coded_form(
        name,
        linear,
        num_bits=4 if is_narrow else 8,
        activation_bits=None if is_float else _PRODUCTS[product] if kind == _W4A4 else 8,
        dtype=dtype,
        groups=groups,
        levels=UNIFORM if groups == 1 else FP8_TABLE,
        rotation=order,
    )


def _groups(relative: Tensor | None, mark: Mapping[str, Any], rows: int, columns: int) -> int:
    """Return the number of groups of a row that a linear of 4-bit weights has scales for; checks all of them."""
    shape = None if relative is None else list(relative.shape)
    if relative is None or relative.ndim != 2 or len(relative) != rows or not relative.numel():
        raise InvalidInputError(f"relative scales of shape {shape}")
    if relative.dtype not in _RELATIVE:
        raise InvalidInputError(f"relative scales in {relative.dtype}")
    groups, size = relative.shape[1], mark.get("group_size", _GROUP)
    if type(size) is not int or size * groups != columns:
        raise InvalidInputError(
            f"relative scales of shape {shape} for groups of {short_repr(size)} of {columns} channels"
        )
    if groups == 1 and bool((relative == 1).all()):
        return 1
    if groups == 1 or not _is_group(size):
        raise InvalidInputError(f"relative scales of groups of {size} of {columns} channels")
    if not mark.get(_BOOK):
        raise InvalidInputError(f"groups of {size} whose {_CODEBOOK} is {'another' if _BOOK in mark else 'missing'}")
    if not bool(torch.isin(relative.float(), torch.tensor(FP8_SCALES).float()).all()):
        raise InvalidInputError("scales of groups other than the whole numbers of 8-bit floating point that s2q writes")
    return groups


def _write(path: Path, tensors: Mapping[str, Tensor], marks: Mapping[str, str], architecture: str) -> None:
    books = {f"{name}.{_CODEBOOK}": _codebook() for name in marks if _has_groups(tensors, name)}
    texts = {
        f"{name}.{_MARK}": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) for name, text in marks.items()
    }
    save_file({**tensors, **books, **texts}, path, metadata=_METADATA)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors, marks = _loaded(path)
    books = _taken(tensors, _CODEBOOK)
    grouped = {name for name in marks if _has_groups(tensors, name)}
    if set(books) != grouped or not all(map(_is_codebook, books.values())):
        raise S2QError(f"{path}: {_CODEBOOK} was read back with other levels; nothing was exported, check the disk")
    return tensors, marks


def _loaded(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a file, and the texts of its marks by the names of their linears."""
    tensors = load_file(path)
    return tensors, {name: bytes(mark.tolist()).decode() for name, mark in _taken(tensors, _MARK).items()}


def _is_codebook(tensor: Tensor) -> bool:
    return torch.equal(tensor.float(), _codebook())


def _taken(tensors: dict[str, Tensor], last: str) -> dict[str, Tensor]:
    """Take the tensors with a last part of their names out, by the names of their linears."""
    end = f".{last}"
    return {name.removesuffix(end): tensors.pop(name) for name in list(tensors) if name.endswith(end)}


def _has_groups(tensors: Mapping[str, Tensor], name: str) -> bool:
    relative = tensors.get(f"{name}.weight_s_rel")
    return relative is not None and relative.ndim == 2 and relative.shape[1] > 1


def read_marked(path: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]], str | None]:
    """Read a file of any writer: tensors and the marks of linears by their original names, and who quantized it.

    Scales of whole weights become those of rows.

    Raises:
        InvalidInputError: If it is no such file, has no marks, or a linear has tensors that no format here has.
    """
    read_header(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    try:
        tensors, texts = _loaded(path)
        marks = {name: json.loads(text) for name, text in texts.items()}
        marks |= json.loads(metadata.get(_HEADER_MARKS, "{}")).get("layers", {})
        known = all(isinstance(mark, dict) for mark in marks.values())
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise InvalidInputError(f"{path}: its marks of quantized linears are damaged; download it again") from error
    if known:
        tensors, marks = _of_transformer(path, tensors, marks)
        marks = {name: {key: value for key, value in mark.items() if key != _BOOK} for name, mark in marks.items()}
        for name, book in _taken(tensors, _CODEBOOK).items():
            marks.setdefault(name, {})[_BOOK] = _is_codebook(book)
    if not known or not marks:
        raise InvalidInputError(
            f"{path}: its transformer has no linears with {_MARK} or {_HEADER_MARKS}, as ComfyUI's quantized files "
            "have; expected one of those, or the folder of a pipeline"
        )
    for name, tensor in list(tensors.items()):
        linear, _, part = name.rpartition(".")
        if linear in marks and part not in ("weight", "bias", *_SCALES):
            raise InvalidInputError(f"{linear}: is stored with {part}, which s2q's packed linears do not have")
        weight = tensors.get(f"{linear}.weight")
        is_whole = part in _SCALES and part != "weight_s_rel" and tensor.numel() == 1
        if linear in marks and is_whole and weight is not None and weight.ndim == 2:
            tensors[name] = tensor.reshape(1).repeat(weight.shape[0])
    return tensors, marks, metadata.get("quantized_by")


def _of_transformer(
    path: Path, tensors: Mapping[str, Tensor], marks: Mapping[str, dict[str, Any]]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Return what a file has of its transformer, without a prefix; other components are logged."""
    prefix = next((prefix for prefix in _PREFIXES if any(name.startswith(prefix) for name in tensors)), "")
    others = {name.partition(".")[0] for name in tensors if not name.startswith(prefix)}
    if others:
        logger.warning(
            "%s: has other components beside the transformer (%s); they are not read, those of --base are copied",
            path,
            ", ".join(short_repr(name) for name in sorted(others)),
        )
    kept = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    inner = {
        name.removeprefix(prefix): mark
        for name, mark in marks.items()
        if name.startswith(prefix) or name.partition(".")[0] not in others
    }
    return kept, inner


def _wrote(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).items() >= _METADATA.items()
    except (OSError, SafetensorError):
        return False


COMFYUI = Target(
    name="comfyui",
    does="a file of the transformer with ConvRot weights of 4 or 8 bits, under the names of the published checkpoints",
    loading="ComfyUI's Load Diffusion Model",
    recipes=("s2q-export-w4a8", "s2q-export-table-w4a8", "s2q-export-w8a8", "s2q-export-w4a4"),
    parts=frozenset({"right"}),
    obstacle=_obstacle,
    unfit_width=_unfit_width,
    encode=_encode,
    decode=_decode,
    kind=_kind,
    levels=(FP8_TABLE,),
    file=FileFormat(
        suffix=".safetensors",
        mark=_mark,
        plain=lambda tensor, is_weight: tensor,
        write=_write,
        read=_read,
        wrote=_wrote,
        misread=_misread,
        suffixes=_SCALES,
    ),
)
COMFYUI_FORMAT = SourceFormat(
    name="comfyui",
    version=f"comfy-kitchen {_FORMAT_VERSION}",
    remedy="as convrot_w4a4, int8_tensorwise, or asym_w4a8_int8 with one group per row and no codebook",
    form=_form,
    weight=_weight,
)
