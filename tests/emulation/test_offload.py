"""Checkpoints under the offloading of diffusers, with adapters, and on real Triton kernels."""

import pytest
import torch
from peft import LoraConfig

from emulation import runs

pytestmark = pytest.mark.gpu

MODELS = ["cogvideox", "wan 2.2 a14b"]


def checkpoint(model):
    return runs.on_cpu(model, "s2q-plus-w4a6" if model == "cogvideox" else "rtn-w4a6").folder


@pytest.mark.parametrize("model", MODELS)
def test_model_offload(model, device):
    pipe = runs.load(checkpoint(model), "cpu")
    expected = runs.latents(pipe)
    pipe.enable_model_cpu_offload(device=device)
    assert runs.relative_error(runs.latents(pipe), expected) <= runs.DIGITS
    pipe.remove_all_hooks()
    pipe.to("cpu")


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
@pytest.mark.parametrize("model", MODELS)
def test_group_offload(model, level, streams, device):
    pipe = runs.load(checkpoint(model), "cpu")
    expected = runs.latents(pipe)
    options = {"num_blocks_per_group": 1} if level == "block_level" else {}
    for name, part in pipe.components.items():
        if name.startswith("transformer") and part is not None:
            part.enable_group_offload(torch.device(device), offload_type=level, use_stream=streams, **options)
        elif isinstance(part, torch.nn.Module):
            part.to(device)
    assert runs.relative_error(runs.latents(pipe), expected) <= runs.DIGITS


@pytest.mark.parametrize("model", MODELS)
def test_an_adapter(model, device):
    pipe = runs.load(checkpoint(model), "cpu")
    plain = runs.latents(pipe)
    torch.manual_seed(0)
    pipe.transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=64, target_modules=["to_q", "to_k"], init_lora_weights=False)
    )
    expected = runs.latents(pipe)
    effect = runs.relative_error(expected, plain)
    assert effect > 1e-3
    pipe.to(device)
    assert runs.relative_error(runs.latents(pipe), expected) < effect / 5
    pipe.transformer.disable_adapters()
    assert runs.relative_error(runs.latents(pipe), plain) < effect / 5


@pytest.mark.parametrize("recipe", ["rtn-w4a6", "s2q-plus-w4a6"])
def test_a_dequantized_model(recipe, device):
    pipe = runs.load(runs.on_cpu("cogvideox", recipe).folder, device)
    pipe.transformer.dequantize()
    on_gpu = runs.latents(pipe)
    assert runs.relative_error(on_gpu, runs.latents(pipe.to("cpu"))) <= runs.DIGITS
