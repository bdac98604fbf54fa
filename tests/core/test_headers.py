import pytest
import torch
from safetensors.torch import save_file

from s2q.core.errors import InvalidInputError
from s2q.core.headers import TensorInfo, read_folder_headers, read_header


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
    assert read_header(path) == {
        "x": TensorInfo(dtype="U8", shape=(3, 5), num_bytes=15),
        "y.z": TensorInfo(dtype="F32", shape=(7,), num_bytes=28),
        "s": TensorInfo(dtype="BF16", shape=(), num_bytes=2),
    }


def test_a_folder_is_the_union_of_its_files(path):
    save_file({"other": torch.zeros(2)}, path.with_name("b.safetensors"))
    assert set(read_folder_headers(path.parent)) == {"x", "y.z", "s", "other"}


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


def test_missing_file(tmp_path):
    with pytest.raises(InvalidInputError, match="cannot be read"):
        read_header(tmp_path / "none.safetensors")


@pytest.mark.parametrize("header", [b"[1, 2]", b'{"x": 3}', b'{"x": {"dtype": "F32"}}', b"\xff\xfe{}"])
def test_damaged_headers_are_one_clear_error(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InvalidInputError, match="damaged"):
        read_header(path)
