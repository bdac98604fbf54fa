import json

import pytest
from safetensors.torch import load_file

from s2q.checkpoint import inspect_checkpoint
from s2q.common.files import sha256_file


@pytest.fixture(scope="module")
def report(checkpoint):
    return inspect_checkpoint(checkpoint, verify=True)


def test_layers_and_their_bytes_are_those_of_the_file(report, checkpoint, teacher):
    stored = load_file(checkpoint / "transformer/diffusion_pytorch_model.safetensors")
    assert len(report.layers) == 20
    for layer in report.layers:
        own = [tensor for name, tensor in stored.items() if name.startswith(f"{layer.name}.")]
        assert layer.bytes == sum(tensor.numel() * tensor.element_size() for tensor in own)
        assert layer.shape == tuple(teacher.transformer.get_submodule(layer.name).weight.shape)


def test_storage_counts_the_whole_transformer(report, checkpoint, teacher):
    stored = load_file(checkpoint / "transformer/diffusion_pytorch_model.safetensors")
    assert report.storage["quantized_bytes"] == sum(
        tensor.numel() * tensor.element_size() for tensor in stored.values()
    )
    full = 2 * sum(parameter.numel() for parameter in teacher.transformer.parameters())
    assert report.storage["full_precision_bytes"] == full
    assert report.storage["ratio"] == full / report.storage["quantized_bytes"] > 2
    assert report.storage["packed_bytes"] == sum(layer.bytes for layer in report.layers)


def test_verified_and_every_file_hashed(report, checkpoint):
    assert report.verified is True
    assert report.problems == ()
    present = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert set(report.files) == present - {"s2q/manifest.json"}
    for name, entry in report.files.items():
        assert entry == {"bytes": (checkpoint / name).stat().st_size, "sha256": sha256_file(checkpoint / name)}


def test_an_unverified_checkpoint_is_reported_as_such(checkpoint):
    assert inspect_checkpoint(checkpoint).verified is None


def test_report_is_plain_data(report):
    content = json.loads(json.dumps(report.to_dict()))
    assert content["schema_version"] == 1
    assert content["recipe"] == "rtn-w4a6"
    assert content["compute_dtype"] == "bfloat16"
    assert content["layers"][0].keys() == {"name", "shape", "scheme", "bytes"}
