import copy

import pytest
import torch
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0

from s2q.benchmark.synthetic_blocks import block_inputs, synthetic_block
from s2q.common.errors import InvalidInputError, ResourceError
from s2q.generation.load import load_pipeline
from s2q.models.attention import (
    DispatchedCogVideoXAttention,
    attention_of,
    check_attention_backend,
    use_attention_registry,
)
from tiny import run_transformer, shrunken, tiny_pipeline, tiny_transformer


def processors(transformer):
    return {type(block.attn1.processor) for block in transformer.transformer_blocks}


@pytest.mark.parametrize("name", ["cogvideox-2b", "cogvideox-5b"])  # without and with rotary embeddings
def test_the_dispatched_attention_is_that_of_diffusers(name):
    model = shrunken(name)
    generator = torch.Generator().manual_seed(0)
    block = synthetic_block(model, model.block_lists[0], generator=generator, dtype=torch.float32)
    inputs = block_inputs(model, model.block_lists[0], tokens=10, generator=generator, dtype=torch.float32)
    assert type(block.attn1.processor) is DispatchedCogVideoXAttention
    with torch.no_grad():
        found = block(**inputs)
        block.attn1.set_processor(CogVideoXAttnProcessor2_0())
        torch.testing.assert_close(found, block(**inputs), rtol=1e-6, atol=1e-6)


def test_a_mask_is_passed_on():
    model = shrunken("cogvideox-2b")
    generator = torch.Generator().manual_seed(0)
    attention = synthetic_block(model, model.block_lists[0], generator=generator, dtype=torch.float32).attn1
    streams = {"hidden_states": torch.randn(2, 10, 96), "encoder_hidden_states": torch.randn(2, 6, 96)}
    mask = torch.zeros(2, 16)
    mask[1, 5:] = -1e4
    with torch.no_grad():
        found = attention(**streams, attention_mask=mask)
        assert not torch.allclose(found[0], attention(**streams)[0])
        attention.set_processor(CogVideoXAttnProcessor2_0())
        torch.testing.assert_close(found, attention(**streams, attention_mask=mask), rtol=1e-6, atol=1e-6)


def test_backends_reach_every_attention(monkeypatch):
    transformer = tiny_transformer()
    expected = run_transformer(transformer)
    kept = copy.deepcopy(transformer)
    use_attention_registry(transformer)
    assert processors(transformer) == {DispatchedCogVideoXAttention}
    torch.testing.assert_close(run_transformer(transformer), expected, rtol=1e-5, atol=1e-5)
    transformer.set_attention_backend("_native_math")
    chosen = {str(block.attn1.processor._attention_backend.value) for block in transformer.transformer_blocks}
    assert chosen == {"_native_math"}
    torch.testing.assert_close(run_transformer(transformer), expected, rtol=1e-5, atol=1e-5)
    transformer.reset_attention_backend()
    assert processors(kept) == {CogVideoXAttnProcessor2_0}


def test_a_pipeline_is_loaded_with_a_backend(tmp_path):
    tiny_pipeline("cogvideox").save_pretrained(tmp_path / "model")
    assert processors(load_pipeline(tmp_path / "model").transformer) == {DispatchedCogVideoXAttention}
    transformer = load_pipeline(tmp_path / "model", attention_backend="_native_math").transformer
    assert transformer.transformer_blocks[0].attn1.processor._attention_backend.value == "_native_math"
    transformer.set_attention_backend("native")  # diffusers' choice is the process's


def test_what_cannot_be_had_is_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="unknown attention backend 'sagge': nearest names are sage"):
        check_attention_backend("sagge")
    with pytest.raises(ResourceError, match="attention backend 'flash' cannot run here"):
        load_pipeline(tmp_path / "nothing", attention_backend="flash")
    with attention_of(None), attention_of("native"):
        pass


def test_families_that_dispatch_already_are_left_alone():
    block = shrunken("wan-1.3b").meta_transformer(blocks=1).blocks[0]
    before = type(block.attn1.processor)
    use_attention_registry(block)
    assert type(block.attn1.processor) is before
