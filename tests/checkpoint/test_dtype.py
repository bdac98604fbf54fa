"""A quantized transformer has the dtype of the full-precision one, and so has what `dequantize()` makes of it."""

from itertools import product

import pytest
import torch

from quick import quick_if
from s2q.nn import PackedLinear
from s2q.run.quantize import quantize
from tiny import reloaded, tiny_call, tiny_pipeline
from tiny_families import TEXT_TO_VIDEO

FAMILIES = [name for name in TEXT_TO_VIDEO if name != "cogvideox rotary"]
OUTER = {"blocks": [], "outer": ["outer.num_bits=8"]}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def is_quick(family, quantized, dtype):
    """All of one family, and half precision of the others."""
    return family == "wan" or (quantized, dtype) == ("outer", torch.bfloat16)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a family in full precision, and quantized with or without what is outside of its blocks."""
    folder = tmp_path_factory.mktemp("models")

    def make(family, name):
        full, out = folder / family / "full", folder / family / name
        if not full.exists():
            tiny_pipeline(family).save_pretrained(full)
        if not out.exists():
            quantize(full, recipe="rtn-w4a6", out=out, overrides=OUTER[name])
        return full, out

    return make


def load(folder, dtype):
    pipe = reloaded(folder, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def parts(pipe):
    return [part for part in (pipe.transformer, getattr(pipe, "transformer_2", None)) if part is not None]


@pytest.mark.parametrize(
    ("family", "quantized", "dtype"), quick_if(is_quick, product(FAMILIES, OUTER, DTYPES)), ids=str
)
def test_the_dtype_is_that_of_full_precision_packed_and_dequantized(models, family, quantized, dtype):
    full, pipe = (load(folder, dtype) for folder in models(family, quantized))
    wanted = {name: parameter.dtype for name, parameter in full.transformer.named_parameters()}
    for part, other in zip(parts(full), parts(pipe), strict=True):
        assert other.dtype == part.dtype == dtype
        assert any(isinstance(module, PackedLinear) for module in other.modules())
        other.dequantize()
        assert other.dtype == dtype
    assert {name: parameter.dtype for name, parameter in pipe.transformer.named_parameters()} == wanted
    if dtype != torch.float16:  # which a CPU lacks operations for
        call = {"generator": torch.Generator().manual_seed(0), "output_type": "latent"}
        assert pipe(prompt="a", **tiny_call(pipe), **call).frames.shape[0] == 1
