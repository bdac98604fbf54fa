"""A quantized transformer has the dtype of the full-precision one, and so has what `dequantize()` makes of it."""

import pytest
import torch
from diffusers import DiffusionPipeline

from s2q.nn import PackedLinear
from s2q.run.quantize import quantize
from tiny import tiny_call, tiny_pipeline
from tiny_families import TEXT_TO_VIDEO

FAMILIES = [name for name in TEXT_TO_VIDEO if name != "cogvideox rotary"]
OUTER = {"blocks": [], "outer": ["outer.num_bits=8"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a family in full precision, and quantized with and without what is outside of its blocks."""
    made = {}

    def make(family):
        if family not in made:
            folder = tmp_path_factory.mktemp("model")
            tiny_pipeline(family).save_pretrained(folder / "full")
            for name, overrides in OUTER.items():
                quantize(folder / "full", recipe="rtn-w4a6", out=folder / name, overrides=overrides)
            made[family] = folder
        return made[family]

    return make


def load(folder, dtype):
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def parts(pipe):
    return [part for part in (pipe.transformer, getattr(pipe, "transformer_2", None)) if part is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantized", OUTER)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_dtype_is_that_of_full_precision_packed_and_dequantized(models, family, quantized, dtype):
    folder = models(family)
    full, pipe = load(folder / "full", dtype), load(folder / quantized, dtype)
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
