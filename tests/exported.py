"""What tests of exports share: overrides of recipes, the linears of a checkpoint, and linears of given codes."""

import pytest
import torch

import s2q
from s2q.common.errors import InvalidInputError
from s2q.core.qparams import RoundedWeight
from s2q.exports.target import LinearForm
from s2q.nn import PackedLinear
from schemes import scheme

CONVROT = "convrot-w4a8"
BRANCH = ("transforms.low_rank=8", "transforms.low_rank_from=weight")
OUTER = ("outer={num_bits: 8}",)
GROUPS = ("weights={num_bits: 4, granularity: per_group, group_size: 32}", "outer=null")
TABLE = ("weights={num_bits: 4, granularity: per_group, group_size: 16, levels: fp8_table}",)
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
LINEAR = "transformer_blocks.0.attn1.to_q"
FILE_LINEAR = "blocks.0.self_attn.q"
"""The linear of Wan by the name of the published checkpoints."""
ROW = [-8, 7, 0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5, -6, 6, -7]
"""Codes of 4 bits of a row of weights."""


def packed_linears(checkpoint):
    """The transformer of a checkpoint, and its quantized linears by name."""
    transformer = s2q.load(checkpoint, dtype="float32", backend="reference").transformer
    names = transformer.config.quantization_config.layers
    return transformer, {name: transformer.get_submodule(name) for name in names}


def assert_refused(words, source, out, **options):
    """Assert that a conversion is refused and leaves nothing."""
    with pytest.raises(InvalidInputError, match=words):
        s2q.convert(source, out=out, **options)
    assert not out.exists()


def linear_of(codes, scale, *, bits=4, activation=None, group_size=None, bias=None, inputs=None, path=None):
    """A packed linear of codes and scales, with its form."""
    codes = torch.tensor(codes, dtype=torch.int8)
    quantized = scheme(bits, activation, group_size=group_size)
    rounded = RoundedWeight(codes=codes, scale=torch.tensor(scale))
    layer = PackedLinear.from_rounded(rounded, bias=bias, scheme=quantized, inputs=inputs, path=path)
    return layer, form_of(layer)


def form_of(layer):
    """The form of a packed linear."""
    return LinearForm(
        name="x",
        in_features=layer.in_features,
        out_features=layer.out_features,
        scheme=layer.scheme,
        path=layer.path,
        dtype=torch.float32,
    )
