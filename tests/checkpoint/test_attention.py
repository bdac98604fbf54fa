"""Int8 attention of a checkpoint: planned, stored, restored by every door, and refused where it does not fit."""

import json

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

import s2q
from s2q.checkpoint import S2QConfig, inspect_checkpoint, load_pipeline
from s2q.common.errors import InvalidInputError
from s2q.nn import quantize_attention
from s2q.nn.attention import attention_modes
from s2q.planning import plan
from s2q.recipes import load_recipe
from s2q.run.quantize import quantize
from tiny import run_transformer, tiny_pipeline

INT8 = ["attention.num_bits=8"]
NAMES = ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, teacher):
    """The checkpoint of the package with int8 attention."""
    out = tmp_path_factory.mktemp("attention") / "int8"
    quantize(teacher, recipe="rtn-w4a6", overrides=INT8, out=out)
    return out


def load(path):
    return CogVideoXTransformer3DModel.from_pretrained(path, subfolder="transformer", dtype=torch.bfloat16)


def test_a_loaded_transformer_attends_in_int8_and_its_linears_are_unchanged(checkpoint, quantized):
    plain, ours = load(checkpoint), load(quantized)
    full = run_transformer(plain, dtype=torch.bfloat16)
    assert not torch.equal(run_transformer(ours, dtype=torch.bfloat16), full)
    quantize_attention(plain, NAMES)
    assert torch.equal(run_transformer(ours, dtype=torch.bfloat16), run_transformer(plain, dtype=torch.bfloat16))
    dequantized = ours.dequantize()
    assert not list(attention_modes(dequantized))


def test_it_is_in_the_configuration_the_inspection_and_the_card(quantized):
    config = json.loads((quantized / "transformer/config.json").read_text())["quantization_config"]
    assert config["attention"] == {"num_bits": 8, "modules": NAMES}
    assert inspect_checkpoint(quantized).attention == tuple(NAMES)
    assert "| Attention | int8 queries and keys in 2 modules |" in (quantized / "README.md").read_text()


def test_a_loaded_pipeline_is_saved_with_it_again(quantized, tmp_path):
    load_pipeline(quantized).transformer.save_pretrained(tmp_path / "transformer")
    assert load(tmp_path).config.quantization_config.attention_modules() == tuple(NAMES)


def test_quantizing_while_loading_gives_the_same(quantized, teacher, tmp_path):
    teacher.transformer.save_pretrained(tmp_path)
    config = s2q.Config("rtn-w4a6", overrides=INT8)
    ours = CogVideoXTransformer3DModel.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    assert ours.config.quantization_config.attention_modules() == tuple(NAMES)
    wanted = run_transformer(load(quantized), dtype=torch.bfloat16)
    assert torch.equal(run_transformer(ours, dtype=torch.bfloat16), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": {"num_bits": 4, "modules": NAMES}}, r"attention.num_bits=4; expected 8"),
        ({"attention": {"num_bits": 8}}, r"attention=.*; expected num_bits and modules"),
        ({"attention": {"num_bits": 8, "modules": "blocks"}}, r"attention.modules='blocks'; expected a list of names"),
        ({"attention": {"num_bits": 8, "modules": NAMES}, "format_version": 1}, "key in quantization_config"),
    ],
)
def test_a_damaged_configuration_is_refused(quantized, change, message):
    config = json.loads((quantized / "transformer/config.json").read_text())["quantization_config"]
    with pytest.raises(InvalidInputError, match=message):
        S2QConfig(**config | change)


def test_a_module_that_the_transformer_lacks_is_refused(quantized, tmp_path):
    transformer = load(quantized)
    transformer.save_pretrained(tmp_path / "transformer")
    path = tmp_path / "transformer/config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["attention"]["modules"][1] = "transformer_blocks.7.attn1"
    path.write_text(json.dumps(config))
    with pytest.raises(InvalidInputError, match=r"transformer_blocks.7.attn1 is in quantization_config, but"):
        load(tmp_path)


@pytest.mark.parametrize("given", ["4", "16", "8.0", "null", "true"])
def test_widths_other_than_8_are_refused(given):
    with pytest.raises(InvalidInputError, match=r"^recipe rtn-w4a6: attention.num_bits="):
        load_recipe("rtn-w4a6", overrides=[f"attention.num_bits={given}"])


def test_attention_in_full_precision_is_that_of_a_recipe_without_options_of_it():
    with pytest.raises(InvalidInputError, match=r"num_bits=16; expected 8, or attention=null for full precision"):
        load_recipe("rtn-w4a6", overrides=["attention.num_bits=16"])
    quantized = load_recipe("rtn-w4a6", overrides=INT8).resolved()
    assert load_recipe(quantized, overrides=["attention=null"]).attention is None


def test_the_plan_counts_the_attention_and_its_flop(teacher, tmp_path):
    teacher.save_pretrained(tmp_path)
    assert plan(tmp_path, recipe="rtn-w4a6").attention is None
    one = [*INT8, "skip=[transformer_blocks.0.*]"]
    assert plan(tmp_path, recipe="rtn-w4a6", overrides=one).attention.modules == 1
    planned = plan("synthetic:wan-1.3b", recipe="s2q-w4a6", overrides=INT8).attention
    assert planned.modules == 30
    self_attention, cross = 4 * 32760**2 * 1536, 4 * 32760 * 512 * 1536
    assert planned.flop == 30 * (self_attention + cross)
    assert planned.quantized_flop == 30 * self_attention / 2


def test_a_model_without_attention_that_can_be_quantized_is_refused(tmp_path):
    pipe = tiny_pipeline("cogvideox")
    config = dict(pipe.transformer.config) | {"attention_head_dim": 144, "num_attention_heads": 1}
    pipe.transformer = CogVideoXTransformer3DModel(**config)
    with pytest.raises(InvalidInputError, match=r"have 144 features; expected at most 128; set attention=null"):
        quantize(pipe, recipe="rtn-w4a6", overrides=INT8, out=tmp_path / "out")
    skipping = [*INT8, "skip=['*attn1*']"]
    with pytest.raises(InvalidInputError, match=r"no attention is left to quantize; skip is \['\*attn1\*'\]"):
        quantize(tiny_pipeline("cogvideox"), recipe="rtn-w4a6", overrides=skipping, out=tmp_path / "out")
    tiny_pipeline("cogvideox").transformer.save_pretrained(tmp_path)
    with pytest.raises(InvalidInputError, match=r"no attention is left to quantize; skip is \['\*attn1\*'\]"):
        CogVideoXTransformer3DModel.from_pretrained(
            tmp_path, quantization_config=s2q.Config("rtn-w4a6", overrides=skipping)
        )
