"""GGUF files with weights of 4 or 8 bits, Q4_0 and Q8_0: diffusers, ComfyUI and others dequantize them as they compute.

    w = d · q        q in -8 … 7 (Q4_0) or -128 … 127 (Q8_0), d fp16, for each 32 input channels

A block of Q4_0 is d and 16 bytes, byte j with q[j] + 8 in its low nibble and q[j + 16] + 8 in its high one; of Q8_0, d
and 32 int8. The codes are those of the checkpoint. Its scales are bf16 values, which fp16 has exactly down to 2⁻¹⁷;
fp32 ones of older checkpoints are rounded. Weights of other linears keep bf16; everything else is fp32, which all
readers take.

A file: "GGUF", version 3, counts, key-value pairs, then name, shape (fastest dimension first), type and offset of every
tensor, then the data, each tensor on a multiple of 32 bytes.

Shapes: `O/I` out/in features, `G` groups of 32.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from s2q.core.qparams import dequantize_weight
from s2q.exports.target import WRITER, FileFormat, LinearForm, Target, Tensors
from s2q.nn import PackedLinear

_GROUP, _ALIGNMENT, _VERSION = 32, 32, 3
_MAGIC = b"GGUF"
_WRITER_KEY = "general.quantized_by"
_UINT32, _STRING = 4, 8
_TYPES = {"Q4_0": 2, "Q8_0": 8}
_PLAIN = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
_FROM_TYPE = {number: dtype for dtype, number in _PLAIN.items()}
_BLOCK_BYTES = {"Q4_0": 18, "Q8_0": 34}
_HALF_SCALE = 2.0**-11


def _obstacle(form: LinearForm) -> str | None:
    if form.activation_bits is not None:
        return f"activations of {form.activation_bits} bits, since its readers compute with unquantized inputs"
    if form.group_size != _GROUP:
        size = "one group for each row" if form.group_size is None else f"groups of {form.group_size}"
        return f"{size} of weights, but groups of {_GROUP}"
    return None


def _kind(form: LinearForm) -> str:
    return "Q4_0" if form.scheme.weight.num_bits <= 4 else "Q8_0"


def _encode(layer: PackedLinear, form: LinearForm) -> dict[str, Tensor]:
    blocks = layer.codes().reshape(form.out_features, -1, _GROUP)
    if _kind(form) == "Q4_0":
        nibbles = (blocks.to(torch.int16) + 8).to(torch.uint8)
        blocks = nibbles[..., : _GROUP // 2] | (nibbles[..., _GROUP // 2 :] << 4)
    scale = layer.weight_scale.half().unsqueeze(-1).contiguous().view(torch.uint8)
    return {"weight": torch.cat([scale, blocks.contiguous().view(torch.uint8)], dim=-1).flatten(1)}


def _decode(tensors: Tensors, form: LinearForm) -> Tensor:
    blocks = tensors["weight"].reshape(form.out_features, -1, _BLOCK_BYTES[_kind(form)])
    scale = blocks[..., :2].contiguous().view(torch.float16)[..., 0].float()
    codes = blocks[..., 2:]
    if _kind(form) == "Q4_0":
        codes = torch.cat([codes & 15, codes >> 4], dim=-1).to(torch.int8) - 8
    else:
        codes = codes.contiguous().view(torch.int8)
    return dequantize_weight(codes.reshape(form.out_features, -1), scale)


def _plain(tensor: Tensor, *, is_weight: bool) -> Tensor:
    return tensor if is_weight and tensor.dtype == torch.bfloat16 else tensor.float()


def _write(path: Path, tensors: Mapping[str, Tensor], marks: Mapping[str, str], architecture: str) -> None:
    """Write tensors; `marks` are the types of quantized weights, uint8 [O, bytes], by the names of their linears."""
    weights = {f"{name}.weight": kind for name, kind in marks.items()}
    with path.open("wb") as file:
        pairs = {"general.architecture": architecture, _WRITER_KEY: WRITER, "general.quantization_version": 2}
        file.write(_MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(pairs)))
        for key, value in pairs.items():
            number = isinstance(value, int)
            file.write(_text(key) + struct.pack("<I", _UINT32 if number else _STRING))
            file.write(struct.pack("<I", value) if number else _text(str(value)))
        offset = 0
        for name, tensor in tensors.items():
            shape, kind = _shape_and_type(tensor, weights.get(name))
            file.write(_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, offset))
            offset += _padded(tensor.nbytes)
        file.write(b"\0" * (_padded(file.tell()) - file.tell()))
        for tensor in tensors.values():
            data = tensor.flatten().view(torch.uint8).numpy()
            file.write(data.data)
            file.write(b"\0" * (_padded(tensor.nbytes) - tensor.nbytes))


def _shape_and_type(tensor: Tensor, kind: str | None) -> tuple[list[int], int]:
    if kind is None:
        return list(tensor.shape) or [1], _PLAIN[tensor.dtype]
    return [tensor.shape[0], tensor.shape[1] // _BLOCK_BYTES[kind] * _GROUP], _TYPES[kind]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `_write` wrote: tensors, and types by the names of quantized linears."""
    names = {number: name for name, number in _TYPES.items()}
    tensors, marks = {}, {}
    mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)  # not in memory
    with path.open("rb") as file:
        count, _ = _header(file)
        described = list(_descriptions(file, count))
        start = _padded(file.tell())
        for name, shape, kind, offset in described:
            data, dtype = mapped[start + offset :], _FROM_TYPE.get(kind, torch.uint8)
            if kind in names:
                marks[name.removesuffix(".weight")] = names[kind]
                shape[1] = shape[1] // _GROUP * _BLOCK_BYTES[names[kind]]
            tensors[name] = data[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
    return tensors, marks


def _wrote(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return _header(file)[1].get(_WRITER_KEY) == WRITER
    except (OSError, ValueError, OverflowError, struct.error):
        return False


def _header(file: BinaryIO) -> tuple[int, dict[str, str | int]]:
    """Read the number of tensors and the pairs; ValueError for a kind of value that `_write` does not write."""
    if file.read(len(_MAGIC)) != _MAGIC:
        raise ValueError("no GGUF file")
    _, count, number = _unpack(file, "<IQQ")
    pairs: dict[str, str | int] = {}
    for _ in range(number):
        key, (kind,) = _read_text(file), _unpack(file, "<I")
        if kind not in (_UINT32, _STRING):
            raise ValueError(f"{key}: a value of type {kind}")
        pairs[key] = _unpack(file, "<I")[0] if kind == _UINT32 else _read_text(file)
    return count, pairs


def _descriptions(file: BinaryIO, count: int) -> Iterator[tuple[str, list[int], int, int]]:
    for _ in range(count):
        name = _read_text(file)
        (ndim,) = _unpack(file, "<I")
        shape = list(reversed(_unpack(file, f"<{ndim}Q")))
        kind, offset = _unpack(file, "<IQ")
        yield name, shape, kind, offset


def _unpack(file: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _read_text(file: BinaryIO) -> str:
    return file.read(_unpack(file, "<Q")[0]).decode()


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


GGUF = Target(
    name="gguf",
    does="a file of the transformer with Q4_0 or Q8_0 weights, under the names of the published checkpoints",
    loading="from_single_file(OUT, quantization_config=GGUFQuantizationConfig(...)), or ComfyUI-GGUF",
    recipes=("s2q-export-w4a16",),
    parts=frozenset(),
    obstacle=_obstacle,
    encode=_encode,
    decode=_decode,
    kind=_kind,
    tolerance=lambda form: _HALF_SCALE,
    rounding="scales are stored in fp16",
    file=FileFormat(suffix=".gguf", mark=_kind, plain=_plain, write=_write, read=_read, wrote=_wrote),
)
