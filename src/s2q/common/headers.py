"""Read the header of a safetensors file: names, dtypes, shapes and bytes of its tensors, without reading the tensors.

A file is: 8 bytes of header length (little endian), the header (JSON), the payload. Its size is checked against the
header, so that a truncated file is found without reading it. Source: the safetensors format description.
"""

import hashlib
import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2q.common.errors import InvalidInputError

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
_SAMPLE_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor in a safetensors header: the format's name of its dtype ("BF16"), and its payload in the file."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    start: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read the header of one safetensors file."""
    remedy = "download or save the model again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(_LENGTH_BYTES)
            if len(prefix) < _LENGTH_BYTES:
                raise InvalidInputError(f"{path}: truncated, {size} bytes are not a safetensors file; {remedy}")
            (header_bytes,) = struct.unpack("<Q", prefix)
            if header_bytes > min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
                raise InvalidInputError(
                    f"{path}: truncated or damaged, its header does not end within the file; {remedy}"
                )
            header = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        payload = _LENGTH_BYTES + header_bytes
        tensors = {name: _tensor_info(entry, payload) for name, entry in header.items()}
        expected = payload + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read ({error.strerror or error}); {remedy}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InvalidInputError(f"{path}: its safetensors header is damaged; {remedy}") from error
    if size != expected:
        raise InvalidInputError(f"{path}: truncated or altered, got {size} bytes, expected {expected}; {remedy}")
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
    start, end = entry["data_offsets"]
    shape = tuple(int(n) for n in entry["shape"])
    return TensorInfo(dtype=str(entry["dtype"]), shape=shape, num_bytes=end - start, start=payload + start)
