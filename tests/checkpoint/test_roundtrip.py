"""A checkpoint loads through every door of diffusers and computes the same behind each."""

import copy
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import AutoModel, CogVideoXPipeline, CogVideoXTransformer3DModel, DiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from s2q.checkpoint import MANIFEST, inspect_checkpoint, load_pipeline
from s2q.common.errors import InvalidInputError, S2QError
from s2q.core.stored_form import packed_dtypes
from s2q.models import block_linears, family_of, outer_linears
from s2q.nn import PackedLinear
from s2q.run.quantize import quantize
from tiny import run_pipeline, run_transformer, tiny_pipeline

FP32 = {"dtype": torch.float32}
BF16 = {"dtype": torch.bfloat16}


def load(path, **arguments):
    return CogVideoXTransformer3DModel.from_pretrained(path, subfolder="transformer", **arguments)


@pytest.fixture(scope="module")
def expected(checkpoint):
    """Output of the checkpoint, run in fp32, through the plainest door."""
    return run_transformer(load(checkpoint, **FP32))


@pytest.fixture(scope="module")
def stored(checkpoint):
    return load_file(checkpoint / "transformer/diffusion_pytorch_model.safetensors")


def listed(transformer):
    """The linears that a recipe quantizes: those of the blocks and outside."""
    family = family_of(transformer)
    return [*block_linears(transformer, family), *outer_linears(transformer, family)]


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    return True


def assert_stored(transformer, stored):
    """Codes and scales are bit for bit what the file has, whatever the dtype of the rest."""
    packed = {name: module for name, module in transformer.named_modules() if isinstance(module, PackedLinear)}
    assert len(packed) == 20
    for name, layer in packed.items():
        assert layer.weight.dtype == torch.uint8
        assert layer.weight_scale.dtype == torch.float32
        assert torch.equal(layer.weight, stored[f"{name}.weight"])
        assert torch.equal(layer.weight_scale, stored[f"{name}.weight_scale"].float())


def write_older(folder, tensors, *, version):
    """Replace the tensors of a checkpoint's transformer and the format version in its configuration."""
    save_file(tensors, folder / "transformer/diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    config = folder / "transformer/config.json"
    content = json.loads(config.read_text())
    content["quantization_config"]["format_version"] = version
    config.write_text(json.dumps(content))


def test_a_checkpoint_of_an_older_version_has_scales_in_fp32_and_keeps_them(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "old")
    (folder / MANIFEST).unlink()
    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    wide = {name: 1.001 * value.float() for name, value in tensors.items() if name.endswith("weight_scale")}
    write_older(folder, tensors | wide, version=1)
    inspected = inspect_checkpoint(folder)
    assert inspected.format_version == 1
    assert inspected.storage["quantized_bytes"] == sum(tensor.nbytes for tensor in (tensors | wide).values())
    transformer = load(folder)
    transformer.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / path.name)
    for name, value in wide.items():
        assert torch.equal(transformer.get_submodule(name.rpartition(".")[0]).weight_scale, value)
        assert torch.equal(again[name], value)
    write_older(folder, tensors | wide, version=4)
    with pytest.raises(S2QError, match="got dtype torch.float32, expected torch.bfloat16"):
        load(folder)


def test_a_checkpoint_of_version_3_has_transforms_in_fp32_and_keeps_them(tmp_path):
    pipe = tiny_pipeline("cogvideox", num_layers=1)
    quantize(pipe, recipe="orbitquant-w4a4", out=tmp_path / "old")
    tensors = load_file(tmp_path / "old/transformer/diffusion_pytorch_model.safetensors")
    wide = {name: value.float() for name, value in tensors.items() if value.dtype == torch.bfloat16}
    assert {name.rpartition(".")[2] for name in wide} == {
        "weight_scale",
        "transform_scale",
        "transform_left",
        "transform_right",
    }
    wide = {name: value if name.endswith("scale") else 1.001 * value for name, value in wide.items()}
    write_older(tmp_path / "old", tensors | wide, version=3)
    (tmp_path / "old" / MANIFEST).unlink()
    assert inspect_checkpoint(tmp_path / "old").format_version == 3
    transformer = load(tmp_path / "old")
    for name, value in wide.items():
        assert torch.equal(transformer.get_parameter(name), value), name
    assert torch.isfinite(run_transformer(transformer)).all()


def test_differs_from_full_precision_but_not_wildly(expected):
    full = run_transformer(tiny_pipeline("cogvideox").transformer)
    error = float((expected - full).square().sum() / full.square().sum())
    assert 1e-6 < error < 0.1


@pytest.mark.parametrize("arguments", [FP32, BF16], ids=["fp32", "bf16"])
def test_a_loaded_transformer_has_the_stored_bytes_and_output(checkpoint, stored, expected, arguments):
    transformer = load(checkpoint, **arguments)
    assert transformer.dtype == arguments["dtype"]
    assert_stored(transformer, stored)
    output = run_transformer(transformer, dtype=arguments["dtype"])
    error = float((output - expected).square().sum() / expected.square().sum())
    assert error < (1e-9 if arguments is FP32 else 1e-3)


def test_auto_model_loads_the_same_output(checkpoint, expected):
    assert close(run_transformer(AutoModel.from_pretrained(str(checkpoint), subfolder="transformer", **FP32)), expected)


@pytest.mark.parametrize("pipeline", [CogVideoXPipeline, DiffusionPipeline])
def test_pipelines_load_the_same_output(checkpoint, expected, pipeline):
    pipe = pipeline.from_pretrained(checkpoint, **BF16)
    assert type(pipe) is CogVideoXPipeline
    assert torch.isfinite(run_pipeline(pipe)).all()
    assert close(run_transformer(pipeline.from_pretrained(checkpoint, **FP32).transformer), expected)


def test_a_pipeline_without_dtype_runs(checkpoint, expected):
    """bf16 files, no dtype: the components must agree on one, or the first linear fails."""
    pipe = CogVideoXPipeline.from_pretrained(checkpoint)
    assert torch.isfinite(run_pipeline(pipe)).all()
    assert close(run_transformer(pipe.transformer), expected)


def test_own_loader_takes_the_dtype_of_the_run(checkpoint):
    pipe = load_pipeline(checkpoint)
    assert pipe.transformer.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.bfloat16
    assert load_pipeline(checkpoint, dtype=torch.float32).transformer.dtype == torch.float32


def test_same_video_as_the_pipeline_in_memory(checkpoint_fp32):
    """Save and load changes nothing: the latents are those of the pipeline that was packed in memory."""
    from s2q.nn import replace_module
    from s2q.planning.resolve import recipe_linears, resolve
    from s2q.recipes.load import load_recipe
    from s2q.rounding import round_rtn

    pipe = tiny_pipeline("cogvideox")
    recipe = load_recipe("rtn-w4a6")
    for plan in resolve(recipe, recipe_linears(recipe, {"transformer": pipe.transformer})):
        linear = pipe.transformer.get_submodule(plan.name)
        rounded = round_rtn(linear.weight, plan.scheme.weight)
        packed = PackedLinear.from_rounded(rounded, bias=linear.bias, scheme=plan.scheme)
        replace_module(pipe.transformer, plan.name, packed)
    loaded = load_pipeline(checkpoint_fp32)
    arguments = {"output_type": "latent", "guidance_scale": 3.0}
    torch.testing.assert_close(run_pipeline(loaded, **arguments), run_pipeline(pipe, **arguments), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_everything_else_is_stored_bit_for_bit(checkpoint, teacher, component):
    """Every tensor but the weights of the block linears, which are replaced by codes and scales."""
    model = getattr(teacher, component)
    replaced = set()
    if component == "transformer":
        replaced = {f"{linear.name}.weight" for linear in listed(model)}
    stored = load_file(checkpoint / component / "diffusion_pytorch_model.safetensors")
    state = model.state_dict()
    assert stored.keys() - state.keys() == {f"{name}_scale" for name in replaced}
    assert stored.keys() >= state.keys()
    for name in state.keys() - replaced:
        assert stored[name].dtype == state[name].dtype
        assert torch.equal(stored[name], state[name]), name


def test_every_listed_linear_is_packed_and_nothing_else(checkpoint, teacher):
    transformer = load(checkpoint, **BF16)
    packed = [name for name, module in transformer.named_modules() if isinstance(module, PackedLinear)]
    assert set(packed) == {linear.name for linear in listed(teacher.transformer)}
    schemes = {name: transformer.get_submodule(name).scheme.name for name in packed}
    modulation = {name for name in packed if "norm1.linear" in name or "norm2.linear" in name}
    assert {schemes[name] for name in modulation} == {"w4a16"}
    inside = {name for name in packed if name.startswith("transformer_blocks.")}
    assert {schemes[name] for name in inside - modulation} == {"w4a6"}
    assert {schemes[name] for name in packed if name not in inside} == {"w8a16"}


def test_the_teacher_is_left_as_it_was(teacher):
    fresh = tiny_pipeline("cogvideox", dtype=torch.bfloat16)
    assert not any(isinstance(module, PackedLinear) for module in teacher.transformer.modules())
    assert "quantization_config" not in teacher.transformer.config
    for name, tensor in fresh.transformer.state_dict().items():
        assert torch.equal(tensor, teacher.transformer.state_dict()[name])


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_a_device_map_gives_the_same_output(checkpoint, expected, device_map):
    transformer = load(checkpoint, device_map=device_map, **FP32)
    assert transformer.hf_device_map
    assert close(run_transformer(transformer), expected)


@pytest.mark.parametrize("arguments", [FP32, BF16], ids=["fp32", "bf16"])
def test_device_map_disk_keeps_the_scales_exact(checkpoint, tmp_path, arguments):
    names = [name for name, _ in load(checkpoint).named_children() if name != "transformer_blocks"]
    device_map = {**dict.fromkeys(names, "cpu"), "transformer_blocks.0": "cpu", "transformer_blocks.1": "disk"}
    transformer = load(checkpoint, device_map=device_map, offload_folder=tmp_path, **arguments)
    on_disk = [module for module in transformer.transformer_blocks[1].modules() if isinstance(module, PackedLinear)]
    assert len(on_disk) == 8
    assert all(layer.weight.is_meta for layer in on_disk)
    output = run_transformer(transformer, dtype=arguments["dtype"])
    assert close(output, run_transformer(load(checkpoint, **arguments), dtype=arguments["dtype"]))


@pytest.fixture(scope="module")
def with_branch(tmp_path_factory):
    """A checkpoint whose linears have low-rank branches."""
    folder = tmp_path_factory.mktemp("branch") / "checkpoint"
    small = ("n_prompts=1", "samples=2", "steps=2", "num_frames=9", "height=16", "width=16")
    overrides = ["transforms.low_rank=2", "transforms.shift=mean", *(f"calibration.{setting}" for setting in small)]
    pipe = tiny_pipeline("cogvideox", num_layers=2)
    quantize(pipe, recipe="rtn-w4a6", prompts=["a red circle"], out=folder, overrides=overrides)
    return folder


def test_device_map_disk_refuses_a_low_rank_branch(with_branch, tmp_path):
    message = r"transformer_blocks\.0\..*: has a low-rank branch, .* use enable_group_offload"
    device_map = {"transformer_blocks.0": "disk", "": "cpu"}
    with pytest.raises(InvalidInputError, match=message):
        load(with_branch, device_map=device_map, offload_folder=tmp_path, **FP32)


@pytest.mark.parametrize("arguments", [FP32, BF16], ids=["fp32", "bf16"])
def test_device_map_disk_keeps_a_low_rank_branch_of_version_3_exact(with_branch, tmp_path, arguments):
    """Files of that version have what layers have, in the same dtypes."""
    loaded = load(with_branch, **arguments)
    old = shutil.copytree(with_branch, tmp_path / "old")
    (old / MANIFEST).unlink()
    tensors = load_file(old / "transformer/diffusion_pytorch_model.safetensors")
    packed = {name: loaded.get_parameter(name) for name in tensors if name.rpartition(".")[2] in packed_dtypes()}
    assert {torch.float8_e4m3fn, torch.bfloat16} <= {tensors[name].dtype for name in packed}
    values = {name: tensor.detach().as_subclass(torch.Tensor).contiguous() for name, tensor in packed.items()}
    write_older(old, tensors | values, version=3)
    names = [name for name, _ in loaded.named_children() if name != "transformer_blocks"]
    device_map = {**dict.fromkeys(names, "cpu"), "transformer_blocks.0": "disk", "transformer_blocks.1": "cpu"}
    transformer = load(old, device_map=device_map, offload_folder=tmp_path / "disk", **arguments)
    on_disk = [module for module in transformer.transformer_blocks[0].modules() if isinstance(module, PackedLinear)]
    assert on_disk
    assert all(layer.weight.is_meta for layer in on_disk)
    assert any(layer.low_rank_basis is not None for layer in on_disk)
    output = run_transformer(transformer, dtype=arguments["dtype"])
    assert torch.equal(output, run_transformer(loaded, dtype=arguments["dtype"]))


def test_a_scale_that_the_file_would_round_is_not_saved(checkpoint, tmp_path):
    transformer = load(checkpoint)
    name, layer = next((n, m) for n, m in transformer.named_modules() if isinstance(m, PackedLinear))
    layer.weight_scale.data.mul_(1.001)
    with pytest.raises(InvalidInputError, match=rf"{re.escape(name)}\.weight_scale: got values that torch\.bfloat16"):
        transformer.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_loading_leaves_no_trace_on_the_class(checkpoint):
    before = copy.copy(CogVideoXTransformer3DModel._keep_in_fp32_modules)
    load(checkpoint, **BF16)
    assert CogVideoXTransformer3DModel._keep_in_fp32_modules == before


def test_model_cpu_offload_gives_the_same_output(checkpoint):
    wanted = run_pipeline(load_pipeline(checkpoint, dtype=torch.float32), output_type="latent")
    pipe = load_pipeline(checkpoint, dtype=torch.float32)
    pipe.enable_model_cpu_offload(device="cpu")
    assert close(run_pipeline(pipe, output_type="latent"), wanted)


def test_sequential_cpu_offload_gives_the_same_output(checkpoint, expected):
    from accelerate import cpu_offload

    transformer = load(checkpoint, **FP32)
    cpu_offload(transformer, torch.device("cpu"))
    assert close(run_transformer(transformer), expected)


@pytest.mark.parametrize(
    "arguments", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
def test_group_offload_gives_the_same_output(checkpoint, expected, arguments):
    transformer = load(checkpoint, **FP32)
    transformer.enable_group_offload(torch.device("cpu"), **arguments)
    assert close(run_transformer(transformer), expected)


def test_a_deepcopy_has_the_stored_bytes_and_output(checkpoint, stored, expected):
    clone = copy.deepcopy(load(checkpoint, **FP32))
    assert_stored(clone, stored)
    assert close(run_transformer(clone), expected)


def test_a_model_saved_again_has_the_same_bytes(checkpoint, stored, expected, tmp_path):
    load(checkpoint, **BF16).save_pretrained(tmp_path)
    assert close(run_transformer(CogVideoXTransformer3DModel.from_pretrained(tmp_path, **FP32)), expected)
    again = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())
    config, first = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path, checkpoint / "transformer")
    )
    assert config["quantization_config"] == first["quantization_config"]


def test_shards_load_the_same_output(checkpoint, expected, tmp_path):
    load(checkpoint, **BF16).save_pretrained(tmp_path, max_shard_size="16KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert close(run_transformer(CogVideoXTransformer3DModel.from_pretrained(tmp_path, **FP32)), expected)


def test_dequantize_gives_the_plain_model_that_the_codes_stand_for(checkpoint, tmp_path):
    packed = load(checkpoint, **FP32)
    weight = packed.transformer_blocks[0].attn1.to_q.dequantized_weight(torch.float32)
    plain = packed.dequantize()
    assert type(plain.transformer_blocks[0].attn1.to_q) is torch.nn.Linear
    assert torch.equal(plain.transformer_blocks[0].attn1.to_q.weight, weight)
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.isfinite(run_transformer(CogVideoXTransformer3DModel.from_pretrained(tmp_path))).all()


def test_casting_a_loaded_model_never_touches_codes_or_scales(checkpoint, stored):
    transformer = load(checkpoint, **FP32)
    with pytest.raises(ValueError, match="unsupported"):
        transformer.to(torch.bfloat16)
    transformer.bfloat16()
    assert_stored(transformer, stored)


def test_quantizing_while_loading_is_refused(tmp_path):
    from s2q.checkpoint import S2QConfig
    from s2q.core.schemes import LinearScheme, PerChannel, QuantScheme

    tiny_pipeline("cogvideox").transformer.save_pretrained(tmp_path)
    scheme = LinearScheme(weight=QuantScheme(num_bits=4, granularity=PerChannel()), activation=None)
    config = S2QConfig.from_schemes({"transformer_blocks.0.attn1.to_q": scheme}, recipe="x", compute_dtype="float32")
    with pytest.raises(S2QError, match=r"run s2q\.quantize .* to quantize while loading"):
        CogVideoXTransformer3DModel.from_pretrained(tmp_path, quantization_config=config)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_output(checkpoint, expected):
    transformer = load(checkpoint, **FP32)
    for block in transformer.transformer_blocks:
        block.compile(backend="eager")
    assert close(run_transformer(transformer), expected)


def test_no_pickle_and_no_path_of_this_machine(checkpoint, tmp_path_factory):
    names = [path.name for path in checkpoint.rglob("*") if path.is_file()]
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]
    for path in checkpoint.rglob("*"):
        if path.suffix in (".json", ".jsonl", ".md"):
            text = path.read_text()
            assert str(checkpoint.parent) not in text
            assert str(tmp_path_factory.getbasetemp()) not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    ["import s2q; from diffusers import CogVideoXPipeline", "from diffusers import CogVideoXPipeline; import s2q"],
)
def test_import_s2q_is_all_that_is_needed(checkpoint, imports):
    script = f"{imports}; CogVideoXPipeline.from_pretrained({str(checkpoint)!r})"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_an_adapter_attaches_and_is_not_fused(checkpoint, expected):
    transformer = load(checkpoint, **FP32)
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    adapted = run_transformer(transformer)
    assert not torch.allclose(adapted, expected, atol=1e-4)
    with pytest.raises(S2QError, match="cannot be merged"):
        transformer.fuse_lora()
    assert close(run_transformer(transformer), adapted)
    transformer.disable_adapters()
    assert close(run_transformer(transformer), expected)


def test_parallel_loading_of_shards(checkpoint, expected, tmp_path, monkeypatch):
    load(checkpoint, **BF16).save_pretrained(tmp_path, max_shard_size="16KB")
    monkeypatch.setenv("HF_ENABLE_PARALLEL_LOADING", "1")
    assert close(run_transformer(CogVideoXTransformer3DModel.from_pretrained(tmp_path, **FP32)), expected)
