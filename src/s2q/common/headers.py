"""Read the header of a safetensors file: names, dtypes, shapes and bytes of its tensors, without reading the tensors.

A file is: 8 bytes of header length (little endian), the header (JSON), the payload. Its size is checked against the
header, so that a truncated file is found without reading it. Source: the safetensors format description.
"""

import errno
import hashlib
import json
import math
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from s2q.common.errors import InvalidInputError, short_repr

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 1 << 25
_SAMPLE_BYTES = 4096
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}
"""By the format's names; their `itemsize` is the width of a value in a file."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor in a safetensors header: the format's name of its dtype ("BF16"), and its payload in the file."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    start: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read the header of one safetensors file; what it says of each tensor is checked."""
    remedy = "download or save the model again"
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        size = status.st_size
        with path.open("rb") as file:
            prefix = file.read(_LENGTH_BYTES)
            if len(prefix) < _LENGTH_BYTES:
                raise InvalidInputError(f"{path}: truncated, {size} bytes are not a safetensors file; {remedy}")
            (header_bytes,) = struct.unpack("<Q", prefix)
            if header_bytes > min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
                raise InvalidInputError(
                    f"{path}: truncated or damaged, its header does not end within the file or is longer than "
                    f"{_MAX_HEADER_BYTES >> 20} MiB; {remedy}"
                )
            header = json.loads(file.read(header_bytes), object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        payload = _LENGTH_BYTES + header_bytes
        tensors = {name: _tensor_info(entry, payload) for name, entry in header.items()}
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read ({error.strerror or error}); {remedy}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidInputError(f"{path}: its safetensors header is damaged; {remedy}") from error
    end = payload
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if tensor.start != end:
            raise InvalidInputError(
                f"{path}: its header is damaged, {short_repr(name)} begins at byte {tensor.start}, expected {end}; "
                f"{remedy}"
            )
        end += tensor.num_bytes
    if size != end:
        raise InvalidInputError(f"{path}: truncated or altered, got {size} bytes, expected {end}; {remedy}")
    return tensors


def read_headers(paths: Iterable[Path]) -> dict[str, TensorInfo]:
    """Read the headers of the files of one component."""
    return {name: tensor for path in paths for name, tensor in read_header(path).items()}


def tensors_digest(path: Path) -> str:
    """Hash the header of a file and the first bytes of each of its tensors; return 64 hexadecimal digits.

    Tells models of one kind apart that were trained differently, in a fraction of the time that reading them takes.
    """
    tensors = read_header(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for name, tensor in sorted(tensors.items()):
            file.seek(tensor.start)
            sample = file.read(min(_SAMPLE_BYTES, tensor.num_bytes))
            digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode() + sample)
    return digest.hexdigest()


def _tensor_info(entry: dict[str, Any], payload: int) -> TensorInfo:
    (start, end), dtype, shape = entry["data_offsets"], entry["dtype"], tuple(entry["shape"])
    if not all(type(size) is int and size >= 0 for size in (start, end, *shape)):
        raise ValueError("sizes are whole numbers from 0")
    if not isinstance(dtype, str):
        raise TypeError("a dtype is text")
    known = DTYPES.get(dtype)  # the dtypes of other models are read by safetensors itself
    if end < start or (known is not None and end - start != known.itemsize * math.prod(shape)):
        raise ValueError("the bytes of a tensor are not those of its shape")
    return TensorInfo(dtype=dtype, shape=shape, num_bytes=end - start, start=payload + start)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, whose keys must differ: which of two tensors of a name counts is up to the reader."""
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key is given twice")
    return content
