import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from s2q.common.errors import InvalidInputError
from s2q.common.headers import (
    TensorInfo,
    read_header,
    read_headers,
    tensors_digest,
)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {
        "x": torch.zeros(3, 5, dtype=torch.uint8),
        "y.z": torch.zeros(7),
        "s": torch.zeros((), dtype=torch.bfloat16),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def test_names_dtypes_shapes_and_bytes(path):
    content, found = path.read_bytes(), read_header(path)
    ends = [one.start + one.num_bytes for one in found.values()]
    assert max(ends) == len(content)
    assert {name: replace(one, start=0) for name, one in found.items()} == {
        "x": TensorInfo(dtype="U8", shape=(3, 5), num_bytes=15, start=0),
        "y.z": TensorInfo(dtype="F32", shape=(7,), num_bytes=28, start=0),
        "s": TensorInfo(dtype="BF16", shape=(), num_bytes=2, start=0),
    }


def test_a_digest_tells_trained_weights_apart(tmp_path):
    weights = {"a": torch.randn(3000), "b": torch.randn(5, 4000)}
    changed = {"trained": {"b": weights["b"] * 1.001}, "flattened": {"b": weights["b"].flatten()}}
    for name, change in {"same": {}, "copy": {}, **changed}.items():
        save_file({**weights, **change}, tmp_path / name, metadata={"name": name})
    digests = {path.name: tensors_digest(path) for path in tmp_path.iterdir()}
    assert digests["same"] == digests["copy"]
    assert len(set(digests.values())) == 3


def test_a_folder_is_the_union_of_its_files(path):
    save_file({"other": torch.zeros(2)}, path.with_name("b.safetensors"))
    assert set(read_headers(path.parent.glob("*.safetensors"))) == {"x", "y.z", "s", "other"}


def test_every_truncation_is_found(path):
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(InvalidInputError, match=r"a\.safetensors"):
            read_header(path)


def test_trailing_bytes_are_found(path):
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(InvalidInputError, match="truncated or altered, got"):
        read_header(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="cannot be read"):
        read_header(tmp_path / "none.safetensors")


@pytest.mark.parametrize("header", [b"[1, 2]", b'{"x": 3}', b'{"x": {"dtype": "F32"}}', b"\xff\xfe{}"])
def test_damaged_headers_are_one_clear_error(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InvalidInputError, match="damaged"):
        read_header(path)


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        "[" * 10**5,
        '{"a":' * 10**5,
        '{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "x": {}}',
        *(
            json.dumps({"x": {**ONE, **changes}})
            for changes in (
                {"shape": [-2]},
                {"shape": [2.0]},
                {"shape": [True, 2]},
                {"shape": [2**62, 4]},
                {"shape": [3]},
                {"dtype": "F64"},
                {"dtype": None},
                {"data_offsets": [8, 0]},
                {"data_offsets": [-8, 0]},
                {"data_offsets": [4, 12]},
                {"data_offsets": [0, 2**63]},
                {"data_offsets": [0, 8, 8]},
            )
        ),
        json.dumps({"x": ONE, "y": ONE}),
        json.dumps({"x": ONE, "y": {**ONE, "data_offsets": [9, 17]}}),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    with pytest.raises(InvalidInputError, match=r"x\.safetensors: .*(damaged|truncated or altered)"):
        read_header(path)


@pytest.mark.parametrize("length", [2**25 + 1, 2**63, 2**64 - 1])
def test_a_header_that_is_too_long_is_not_read(tmp_path, length):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(2**26)
    with pytest.raises(InvalidInputError, match="does not end within the file or is longer than 32 MiB"):
        read_header(path)
