"""SDNQ's own checkpoints, converted: linear by linear, what its forward computes. Where sdnq is installed."""

import importlib.util
import os

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from torch import nn

import s2q
from s2q.common.errors import InvalidInputError
from s2q.models import block_linears, family_of
from tiny import tiny_pipeline

pytestmark = pytest.mark.skipif(importlib.util.find_spec("sdnq") is None, reason="sdnq is not installed")

W4A8 = {"weights_dtype": "int4", "use_svd": True, "svd_rank": 8, "use_hadamard": True, "use_quantized_matmul": True}
SETTINGS = {
    "W4A8, branch": (W4A8 | {"group_size": -1}, {"w4a8", "w4a16"}, 4e-3),
    "W4A8": (W4A8 | {"use_svd": False, "group_size": -1}, {"w4a8", "w4a16"}, 5e-6),
    "W4A8, Sylvester": (
        W4A8 | {"use_svd": False, "group_size": -1, "hadamard_group_size": 32},
        {"w4a8", "w4a16"},
        5e-6,
    ),
    "W4A8, groups": (W4A8 | {"use_svd": False, "group_size": 32}, {"w4g32a8", "w4a16"}, 2e-2),
    "W8A8": ({"weights_dtype": "int8", "use_quantized_matmul": True}, {"w8a8", "w8a16"}, 5e-6),
    "W8A8, a scale for all": (
        {"weights_dtype": "int8", "group_size": -2, "use_quantized_matmul": True},
        {"w8a8", "w8a16"},
        5e-6,
    ),
    "W4A16": ({"weights_dtype": "int4", "group_size": 32}, {"w4g32a16", "w4a16"}, 5e-6),
    "W8A16, branch": ({"weights_dtype": "int8", "use_svd": True, "svd_rank": 8}, {"w8a16"}, 1e-2),
}
"""Options of SDNQ, the schemes of the converted linears, and the largest difference of an output, relative to its
largest magnitude: branches are rounded to bf16, and SDNQ rounds weights in groups again before an int8 product."""


@pytest.fixture
def quantized(tmp_path, monkeypatch):
    """Returns the folder of a tiny pipeline that SDNQ has quantized, and its transformer."""
    monkeypatch.setitem(os.environ, "SDNQ_USE_TORCH_COMPILE", "0")

    def make(**options):
        from diffusers import SDNQConfig

        pipe = tiny_pipeline("cogvideox")
        pipe.save_pretrained(tmp_path / "full")
        names = {linear.name for linear in block_linears(pipe.transformer, family_of(pipe.transformer))}
        modules = pipe.transformer.named_modules()
        others = [f".{name}." for name, part in modules if isinstance(part, nn.Linear) and name not in names]
        config = SDNQConfig(
            modules_to_not_convert=[*others, ".patch_embed."],
            add_skip_keys=False,
            minimum_allowed_numel=0,
            minimum_allowed_channel_size=0,
            **options,
        )
        pipe.transformer = CogVideoXTransformer3DModel.from_pretrained(
            tmp_path / "full", subfolder="transformer", quantization_config=config
        )
        pipe.save_pretrained(tmp_path / "sdnq")
        return tmp_path / "sdnq", pipe.transformer

    return make


@pytest.mark.parametrize("setting", SETTINGS)
def test_linears_compute_what_sdnq_computes(quantized, setting, tmp_path):
    options, schemes, tolerance = SETTINGS[setting]
    folder, theirs = quantized(**options)
    s2q.convert(folder, out=tmp_path / "out")
    ours = s2q.load(tmp_path / "out", dtype="float32").transformer
    layers = ours.config.quantization_config.layers
    assert set(layers.values()) == schemes
    generator = torch.Generator().manual_seed(0)
    for name, scheme in layers.items():
        linear = ours.get_submodule(name)
        rows = 40 if scheme.endswith("a8") else 4  # SDNQ quantizes inputs of at least 32 rows
        x = torch.randn(rows, linear.in_features, generator=generator)
        expected = theirs.get_submodule(name)(x)
        difference = float((linear(x) - expected).abs().max() / expected.abs().max())
        assert difference < tolerance, f"{name}: {difference:.1e}"


def test_zero_points_are_refused(quantized, tmp_path):
    folder, _ = quantized(weights_dtype="uint4")
    with pytest.raises(InvalidInputError, match="is stored with uint4 weights and zero points"):
        s2q.convert(folder, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
