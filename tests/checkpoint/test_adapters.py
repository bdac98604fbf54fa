"""Adapters on quantized transformers: respected, or refused in one line with nothing changed."""

import copy

import peft
import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file

import s2q
from s2q.checkpoint import write_manifest
from s2q.common.components import has_adapter
from s2q.common.errors import InvalidInputError, S2QError, UsageError
from s2q.nn import PackedLinear
from tiny import run_transformer, tiny_pipeline

TARGETS = ["to_q", "to_k", "ff.net.2"]


def load(checkpoint):
    return CogVideoXTransformer3DModel.from_pretrained(checkpoint, subfolder="transformer", dtype=torch.float32)


def lora(**options):
    return peft.LoraConfig(**{"r": 2, "target_modules": TARGETS, "init_lora_weights": False, **options})


@pytest.fixture
def transformer(checkpoint):
    return load(checkpoint)


@pytest.fixture
def adapted(transformer):
    torch.manual_seed(0)
    transformer.add_adapter(lora())
    return transformer


def packed(model):
    return [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]


OTHERS = {
    "LoHa": lambda: peft.LoHaConfig(r=2, target_modules=["to_q"], init_weights=False),
    "LoKr": lambda: peft.LoKrConfig(r=2, target_modules=["to_q"], init_weights=False),
    "HRA": lambda: peft.HRAConfig(r=2, target_modules=["to_q"]),
    "DeLoRA": lambda: peft.DeloraConfig(r=2, target_modules=["to_q"]),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=["to_q"]),
    "PiSSA": lambda: lora(init_lora_weights="pissa"),
    "PiSSA, fast": lambda: lora(init_lora_weights="pissa_niter_4"),
    "OLoRA": lambda: lora(init_lora_weights="olora"),
    "orthogonal": lambda: lora(init_lora_weights="orthogonal"),
    "DoRA": lambda: lora(use_dora=True),
    "IA3": lambda: peft.IA3Config(target_modules=["to_q"], feedforward_modules=[]),
    "OFT": lambda: peft.OFTConfig(oft_block_size=8, r=0, target_modules=["to_q"]),
    "rsLoRA": lambda: lora(use_rslora=True),
}
WORKING = ("BOFT", "IA3", "OFT", "rsLoRA")


@pytest.mark.parametrize("name", OTHERS)
def test_an_adapter_works_or_is_refused_in_one_line_and_a_plain_one_attaches_afterwards(transformer, name):
    expected = run_transformer(transformer)
    try:
        transformer.add_adapter(OTHERS[name]())
        assert torch.isfinite(run_transformer(transformer)).all()
        refused = None
    except UsageError as error:
        refused = str(error)
    assert (refused is None) == (name in WORKING)
    if refused is not None:
        assert refused.startswith("transformer_blocks.0.attn1.to_q (w4a6): packed codes cannot be")
        assert "\n" not in refused
    if has_adapter(transformer):
        transformer.unload_lora()
    torch.testing.assert_close(run_transformer(transformer), expected, rtol=0, atol=1e-6)
    torch.manual_seed(0)
    transformer.add_adapter(lora(), "plain")
    transformer.set_adapter("plain")
    assert not torch.allclose(run_transformer(transformer), expected, atol=1e-4)


def test_dequantizing_keeps_the_adapter_which_can_then_be_fused(adapted, checkpoint):
    plain = load(checkpoint).dequantize()
    torch.manual_seed(0)
    plain.add_adapter(lora())
    adapters = {name: tensor.clone() for name, tensor in adapted.state_dict().items() if "lora_" in name}
    adapted.dequantize()
    assert not packed(adapted)
    assert not adapted.is_quantized
    assert "quantization_config" not in adapted.config
    state = adapted.state_dict()
    assert all(torch.equal(state[name], value) for name, value in adapters.items())
    expected = run_transformer(plain)
    assert torch.equal(run_transformer(adapted), expected)
    adapted.fuse_lora()
    adapted.unload_lora()
    torch.testing.assert_close(run_transformer(adapted), expected, rtol=1e-4, atol=1e-4)


def test_two_adapters_and_nested_wrappers_are_dequantized_too(adapted):
    adapted.add_adapter(lora(r=3), "second")
    adapted.set_adapters(["default", "second"], [1.0, 0.5])
    run_transformer(adapted.dequantize())
    assert not packed(adapted)


def replaced(transformer):
    transformer.transformer_blocks[1].attn1.to_k = torch.nn.Linear(64, 64)


def offloaded(transformer):
    from accelerate import cpu_offload

    cpu_offload(transformer, execution_device="cpu")


def group_offloaded(transformer):
    transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


def damaged(transformer):
    layer = transformer.transformer_blocks[1].ff.net[2]
    layer._parameters["weight_scale"] = torch.nn.Parameter(torch.ones(3), requires_grad=False)


@pytest.mark.parametrize("spoil", [replaced, offloaded, group_offloaded, damaged])
@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "adapted"])
def test_dequantizing_that_cannot_be_finished_changes_nothing(transformer, spoil, adapter):
    if adapter:
        transformer.add_adapter(lora(target_modules=["to_q"]))
    spoil(transformer)
    before, config = packed(transformer), dict(transformer.config)
    with pytest.raises((UsageError, RuntimeError)) as refused:
        transformer.dequantize()
    assert isinstance(refused.value, UsageError) or spoil is damaged
    assert packed(transformer) == before
    assert dict(transformer.config) == config
    assert transformer.is_quantized


@pytest.mark.parametrize("copied", [False, True], ids=["loaded", "copied"])
def test_saving_with_an_adapter_is_refused_before_anything_is_written(adapted, tmp_path, copied):
    model = copy.deepcopy(adapted) if copied else adapted
    with pytest.raises(
        UsageError, match=r"not saved with an adapter attached; keep the adapter with save_lora_weights"
    ):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    expected = run_transformer(load_adapterless(model))
    model.save_pretrained(tmp_path / "out")
    loaded = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(run_transformer(loaded), expected)


def load_adapterless(model):
    model.unload_lora()
    return model


def test_a_copy_without_adapter_is_saved_although_the_original_has_one(transformer, tmp_path):
    other = copy.deepcopy(transformer)
    transformer.add_adapter(lora())
    other.save_pretrained(tmp_path / "out")
    assert not has_adapter(CogVideoXTransformer3DModel.from_pretrained(tmp_path / "out"))
    with pytest.raises(UsageError, match="adapter attached"):
        transformer.save_pretrained(tmp_path / "other")


def test_the_pipeline_of_a_run_is_saved_by_the_same_rule(checkpoint, tmp_path):
    pipe = CogVideoXPipeline.from_pretrained(checkpoint, dtype=torch.float32)
    pipe.transformer.add_adapter(lora())
    with pytest.raises(UsageError, match="adapter attached"):
        pipe.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "model_index.json").exists()
    adapter = peft.get_peft_model_state_dict(pipe.transformer)
    pipe.save_lora_weights(tmp_path / "lora", transformer_lora_layers=adapter)
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "out")
    again = CogVideoXPipeline.from_pretrained(tmp_path / "out", dtype=torch.float32)
    again.load_lora_weights(tmp_path / "lora")
    assert has_adapter(again.transformer)


def test_a_checkpoint_that_was_saved_with_an_adapter_is_refused_in_one_line(copy):
    path = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    stored = load_file(path)
    for tensor in ("weight", "weight_scale", "bias"):
        name = "transformer_blocks.0.attn1.to_q"
        stored[f"{name}.base_layer.{tensor}"] = stored.pop(f"{name}.{tensor}")
    stored["transformer_blocks.0.attn1.to_q.lora_A.default.weight"] = torch.zeros(2, 64)
    save_file(stored, path, metadata={"format": "pt"})
    write_manifest(copy)
    for open_it in (CogVideoXPipeline.from_pretrained, lambda folder: s2q.load(folder, verify=False)):
        with pytest.raises(InvalidInputError, match=r"to_q\..*saved with an adapter attached.*unload_lora_weights"):
            open_it(copy)


def test_a_full_precision_model_that_was_saved_with_an_adapter_is_refused_before_any_compute(tmp_path):
    pipe = tiny_pipeline("cogvideox")
    pipe.transformer.add_adapter(lora())
    pipe.save_pretrained(tmp_path / "model")
    out = {"recipe": "rtn-w4a6", "out": tmp_path / "out"}
    message = r"saved with an adapter attached.*fuse_lora\(\)"
    for verb in (s2q.load, lambda model: s2q.plan(model, recipe="rtn-w4a6"), lambda model: s2q.quantize(model, **out)):
        with pytest.raises(InvalidInputError, match=message):
            verb(tmp_path / "model")
    with pytest.raises(InvalidInputError, match=r"has an adapter; call fuse_lora\(\)"):
        s2q.quantize(pipe, **out)
    assert not (tmp_path / "out").exists()
    pipe.fuse_lora()
    with pytest.raises(S2QError, match="has an adapter"):
        s2q.quantize(pipe, **out)
    pipe.unload_lora_weights()
    s2q.quantize(pipe, **out)


@pytest.mark.parametrize("name", ["adapter_config.json", "pytorch_lora_weights.safetensors"])
def test_a_folder_of_an_adapter_is_no_model(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(InvalidInputError, match="is an adapter, not a model; load the model, then .*load_lora_weights"):
        s2q.load(tmp_path)
