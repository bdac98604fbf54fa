import json

import pytest
import torch
from safetensors.torch import load_file

from quick import quick_if
from s2q.common.errors import InvalidInputError
from s2q.common.log import log_once
from s2q.models import ModelSource
from s2q.planning import plan
from s2q.recipes.load import load_recipe, recipe_names
from s2q.run.quantize import quantize
from tiny import run_pipeline, tiny_pipeline

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline("cogvideox", dtype=torch.bfloat16).save_pretrained(path)
    return path


def tensor_bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def one_of_each_size():
    """One recipe of each method and width of weights; how wide activations are changes no byte."""
    found = {}
    for name in recipe_names():
        recipe = load_recipe(name)
        found[name.rpartition("-")[0], recipe.weights.num_bits, recipe.activations is None] = name
    return sorted(found.values())


def one_of_each_method():
    """The narrowest weights of each method are among the quick tests."""
    narrowest = {name.rpartition("-")[0]: name for name in reversed(one_of_each_size())}
    return quick_if(lambda name, *_: name in narrowest.values(), [(name, (), None) for name in one_of_each_size()])


@pytest.mark.parametrize(
    ("recipe", "overrides", "dtype"),
    [
        *one_of_each_method(),
        ("rtn-w4a6", (), "float32"),
        ("rtn-w4a6", ("modulation=null", "skip=['transformer_blocks.1.*']"), None),
        ("rtn-w4a16", ("weights.granularity=per_group", "weights.group_size=16"), None),
        ("rtn-w4a8", ("weights.num_bits=3", "weights.granularity=per_group", "weights.group_size=64"), None),
        ("rtn-w8a8", ("weights.num_bits=5", "modulation.num_bits=2"), None),
    ],
)
def test_bytes_on_disk_are_the_planned_ones_exactly(folder, tmp_path, recipe, overrides, dtype):
    if (loaded := load_recipe(recipe)).calibrates:
        overrides = ("calibration.steps=1", "calibration.samples=1", *overrides)
    if loaded.distillation:
        overrides = ("distillation.epochs=1", *overrides)
    if loaded.allocation:  # the published budgets are for wide models
        overrides = (f"allocation.budget={loaded.allocation.budget + 1}", *overrides)
    planned = plan(folder, recipe=recipe, overrides=overrides, dtype=dtype)
    report = quantize(folder, recipe=recipe, overrides=overrides, dtype=dtype, out=tmp_path / "out", prompts=["a"])
    stored = load_file(tmp_path / "out" / WEIGHTS)
    for layer, after in zip(planned.layers, report.layers, strict=True):
        own = [tensor for name, tensor in stored.items() if name.startswith(f"{layer.name}.")]
        assert tensor_bytes(own) == after["bytes"], layer
        assert after["bytes"] == layer.bytes or (loaded.allocation and after["bytes"] < layer.bytes)
    assert tensor_bytes(stored.values()) == report.storage["quantized_bytes"]
    if loaded.allocation:
        assert report.storage["quantized_bytes"] <= planned.storage["quantized_bytes"]
    else:
        assert report.storage == planned.storage


@pytest.mark.parametrize("learned", [False, True])
def test_bytes_with_rotary_and_learned_positions(tmp_path, learned):
    """Learned positions are a buffer that is stored: it counts; computed ones are not."""
    from diffusers import CogVideoXTransformer3DModel

    from s2q.checkpoint import load_pipeline

    pipe = tiny_pipeline("cogvideox rotary")
    config = {key: value for key, value in pipe.transformer.config.items() if not key.startswith("_")}
    config["use_learned_positional_embeddings"] = learned
    pipe.register_modules(transformer=CogVideoXTransformer3DModel(**config).eval())
    pipe.save_pretrained(tmp_path / "model")
    quantize(tmp_path / "model", recipe="rtn-w4a6", out=tmp_path / "out")
    stored = load_file(tmp_path / "out" / WEIGHTS)
    assert ("patch_embed.pos_embedding" in stored) == learned
    assert tensor_bytes(stored.values()) == plan(tmp_path / "model", recipe="rtn-w4a6").storage["quantized_bytes"]
    assert torch.isfinite(run_pipeline(load_pipeline(tmp_path / "out"))).all()


def test_ratio_is_against_bf16_of_the_whole_transformer_whatever_the_dtype(folder):
    parameters = sum(one.numel() for one in tiny_pipeline("cogvideox").transformer.parameters())
    for dtype in ("bfloat16", "float32"):
        storage = plan(folder, recipe="rtn-w4a6", dtype=dtype).storage
        assert storage["full_precision_bytes"] == 2 * parameters
        assert storage["ratio"] == 2 * parameters / storage["quantized_bytes"]


def test_every_block_linear_is_listed_untouched_ones_with_their_dtype(folder):
    planned = plan(folder, recipe="rtn-w4a6", overrides=["skip=['transformer_blocks.0.*']"])
    assert len(planned.layers) == 20
    assert {layer.scheme for layer in planned.layers if layer.name.startswith("transformer_blocks.0.")} == {"bf16"}
    assert {layer.scheme for layer in planned.layers if layer.name.startswith("transformer_blocks.1.")} == {
        "w4a6",
        "w4a16",
    }


def test_cogvideox_2b_has_the_published_ratio():
    """CogVideoX-2B by its published configuration, with the adaLN linears at 4 bits and without."""
    from diffusers import CogVideoXTransformer3DModel

    from s2q.planning import plan_transformers
    from s2q.planning.resolve import recipe_linears, resolve
    from s2q.recipes.load import load_recipe

    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel(num_attention_heads=30, attention_head_dim=64, num_layers=30)
    transformers = {"transformer": transformer}
    sizes = {name: 2 * tensor.numel() for name, tensor in transformer.state_dict().items()}
    ratios = {}
    for overrides in ((), ("modulation=null",)):
        recipe = load_recipe("rtn-w4a6", overrides=overrides)
        linears = resolve(recipe, recipe_linears(recipe, transformers))
        planned = plan_transformers(transformers, recipe, linears, model="2b", sizes=sizes, dtype=torch.bfloat16)
        ratios[overrides] = round(planned.storage["ratio"], 2)
    assert ratios == {(): 3.95, ("modulation=null",): 2.44}


def test_a_transformer_is_built_once(folder, monkeypatch):
    built, original = [], ModelSource.meta_transformer

    def counted(source, component):
        built.append(component)
        return original(source, component)

    monkeypatch.setattr(ModelSource, "meta_transformer", counted)
    assert plan(folder, recipe="s2q-w4a6").calibration is not None
    assert built == ["transformer"]


def test_a_plan_is_json_data(folder):
    content = json.loads(json.dumps(plan(folder, recipe="rtn-w4a6").to_dict()))
    assert content.keys() == {
        *("schema_version", "model", "recipe", "storage", "stages", "layers", "simulated", "device", "calibration"),
        *("allocation", "attention", "estimate", "widths", "generation", "text_encoders"),
        *("offload", "fitting_tokens"),
    }
    assert content["widths"].keys() == {"products", "native", "same_cost", "recommended"}
    assert content["widths"]["products"].keys() == {"unit", "integer", "fp4", "is_gpu"}
    assert content["storage"].keys() == {"full_precision_bytes", "quantized_bytes", "ratio"}
    assert [stage.keys() for stage in content["stages"]] == [
        {"name", "peak_memory_bytes", "seconds", "flop", "traffic_bytes"}
    ] * 2
    assert content["layers"][0] == {
        "name": "transformer_blocks.0.norm1.linear",
        "shape": [384, 32],
        "scheme": "w4a16",
        "bytes": 384 * 16 + 384 * 2 + 384 * 2,
    }


def test_a_quantized_model_is_refused(folder, tmp_path):
    quantize(folder, recipe="rtn-w4a6", out=tmp_path / "out")
    with pytest.raises(InvalidInputError, match=r"out: its transformer is already quantized \(by s2q\)"):
        plan(tmp_path / "out", recipe="rtn-w4a6")


def test_an_unsupported_transformer_class_is_refused(folder, tmp_path):
    import shutil

    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "transformer/config.json").read_text())
    (copy / "transformer/config.json").write_text(json.dumps({**config, "_class_name": "FluxTransformer2DModel"}))
    with pytest.raises(InvalidInputError, match="'FluxTransformer2DModel' is not supported; supported classes: Cog"):
        plan(copy, recipe="rtn-w4a6")


@pytest.mark.parametrize(
    ("model", "recipe", "reduction"),
    [
        ("cogvideox-2b", "s2q-w4a6", 3.90),  # the first three are the paper's
        ("cogvideox-5b", "s2q-w4a6", 3.94),
        ("hunyuanvideo", "s2q-w4a6", 3.68),
        ("cogvideox-5b", "s2q-plus-w4a6", 3.8),
    ],
)
def test_published_models_are_reduced_as_in_the_paper(model, recipe, reduction):
    assert plan(f"synthetic:{model}", recipe=recipe).storage["ratio"] >= reduction


def test_encoders_of_published_sizes_are_said_not_to_be_counted(caplog):
    log_once.cache_clear()
    planned = plan("synthetic:wan-1.3b", recipe="rtn-w4a8", overrides=["text_encoder.num_bits=8"])
    assert planned.text_encoders == ()
    assert "has no text encoder; text_encoder of the recipe is not counted" in caplog.text
