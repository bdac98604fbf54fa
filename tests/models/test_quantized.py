"""Models that are already quantized: found, and refused with the full-precision model that they were made from."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import s2q
from s2q.common.errors import InvalidInputError
from s2q.models.quantized import full_precision_origin, quantization_method
from s2q.shapes.embedded import embedded_folder
from tiny import tiny_pipeline, tiny_transformer

METHODS = ["bitsandbytes", "torchao", "gguf", "quanto", "sdnq"]
CONVERTS = "; s2q convert keeps its codes if they are int4 or int8"


@pytest.fixture
def foreign(tmp_path):
    """Returns a pipeline folder whose transformer claims to be quantized by a method."""

    def make(method):
        folder = tmp_path / "foreign"
        tiny_pipeline("cogvideox").save_pretrained(folder)
        path = folder / "transformer/config.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"quantization_config": {"quant_method": method}}))
        return folder

    return make


@pytest.mark.parametrize("method", METHODS)
def test_quantized_models_are_refused_with_their_full_precision_source(foreign, method, tmp_path):
    folder = foreign(method)
    remedy = CONVERTS if method == "sdnq" else ""
    (folder / "README.md").write_text("---\nbase_model:\n- acme/model\n---\n")
    words = rf"^foreign: its transformer is already quantized \(by {method}\); pass the full-precision model, "
    for call in (s2q.plan, s2q.quantize):
        options = {"out": tmp_path / "out"} if call is s2q.quantize else {}
        with pytest.raises(InvalidInputError, match=f"{words}acme/model{remedy}$"):
            call(folder, recipe="rtn-w4a6", **options)
    (folder / "README.md").unlink()
    with pytest.raises(InvalidInputError, match=f"{words}the one that it was made from{remedy}$"):
        s2q.plan(folder, recipe="rtn-w4a6")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", [*METHODS, "s2q"])
def test_a_config_for_a_quantized_model_is_refused(foreign, method):
    from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel

    folder, config = foreign(method), s2q.Config("table-w4a8")
    (folder / "README.md").write_text("---\nbase_model: acme/base\n---\n")
    words = rf"from_pretrained: its transformer is already quantized \(by {method}\); pass the full-.* acme/base"
    with pytest.raises(InvalidInputError, match=words):
        CogVideoXTransformer3DModel.from_pretrained(folder, subfolder="transformer", quantization_config=config)
    with pytest.raises(InvalidInputError, match=words):
        CogVideoXPipeline.from_pretrained(folder, quantization_config=config)


def test_a_config_for_a_quantized_text_encoder_is_refused(foreign):
    from diffusers import CogVideoXPipeline
    from transformers import T5EncoderModel

    folder, config = foreign("sdnq"), s2q.Config("table-w4a8", components=["text_encoder"])
    for component, method in (("transformer", None), ("text_encoder", "bitsandbytes")):
        path = folder / component / "config.json"
        stored = None if method is None else {"quant_method": method, "load_in_8bit": True}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": stored}))
    words = r"from_pretrained: its text_encoder is already quantized \(by bitsandbytes\); pass the full-precision model"
    with pytest.raises(InvalidInputError, match=words):
        CogVideoXPipeline.from_pretrained(folder, quantization_config=config)
    with pytest.raises(InvalidInputError, match=words):
        T5EncoderModel.from_pretrained(folder / "text_encoder", quantization_config=s2q.Config("table-w4a8"))


def test_other_configurations_are_merged_by_diffusers():
    from diffusers.quantizers.auto import DiffusersAutoQuantizer

    s2q.Config("table-w4a8")
    s2q.Config("table-w4a8")
    stored = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    merged = DiffusersAutoQuantizer.merge_quantization_configs(stored, None)
    assert merged.load_in_8bit
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        DiffusersAutoQuantizer.merge_quantization_configs(stored, merged)


def of_package(package, base):
    return type("Foreign", (base,), {"__module__": f"{package}.inner"})


@pytest.mark.parametrize(
    ("package", "method"),
    [("bitsandbytes", "bitsandbytes"), ("optimum", "quanto"), ("sdnq", "sdnq"), ("comfy_kitchen", "comfy-kitchen")]
    + [("diffusers.quantizers.gguf", "gguf")],
)
def test_loaded_transformers_that_a_tool_has_changed_itself_are_found(package, method, tmp_path):
    pipe = tiny_pipeline("cogvideox")
    assert quantization_method(pipe.transformer) is None
    block = pipe.transformer.transformer_blocks[0]
    block.attn1.to_q.__class__ = of_package(package, nn.Linear)
    assert quantization_method(pipe.transformer) == method
    words = rf"CogVideoXPipeline: its transformer is already quantized \(by {method}\)"
    with pytest.raises(InvalidInputError, match=words):
        s2q.quantize(pipe, recipe="rtn-w4a6", out=tmp_path / "out")


def test_parameters_of_a_tool_are_found():
    transformer = tiny_transformer()
    linear = transformer.transformer_blocks[0].attn1.to_q
    linear.weight = nn.Parameter(linear.weight.data.as_subclass(of_package("torchao", torch.Tensor)))
    assert quantization_method(transformer) == "torchao"


def test_what_diffusers_has_quantized_is_named():
    transformer = SimpleNamespace(is_quantized=True, quantization_method=SimpleNamespace(value="gguf"))
    assert quantization_method(transformer) == "gguf"
    assert quantization_method(SimpleNamespace(is_quantized=True)) == "another method"


def test_a_model_that_was_quantized_as_it_was_loaded_names_its_folder(tmp_path):
    tiny_pipeline("cogvideox").save_pretrained(tmp_path / "full")
    pipe = s2q.load(tmp_path / "full")
    pipe.transformer.is_quantized = True
    words = f"by another method\\); pass the full-precision model, {tmp_path / 'full'}$"
    with pytest.raises(InvalidInputError, match=words):
        s2q.quantize(pipe, recipe="rtn-w4a6", out=tmp_path / "out")


def test_the_origin_is_a_full_precision_folder_the_base_of_the_card_or_a_hub_id(foreign, tmp_path):
    quantized, plain = foreign("sdnq"), tmp_path / "plain"
    tiny_pipeline("cogvideox").save_pretrained(plain)
    cached = tmp_path / "hub/models--acme--wan/snapshots/0123"
    (cached / "transformer").mkdir(parents=True)

    def origin(place, folder=quantized):
        return full_precision_origin(folder, {"_name_or_path": place}, {})

    assert origin(str(plain / "transformer")) == str(plain)
    assert origin(str(cached / "transformer")) == "acme/wan"
    assert origin(str(embedded_folder("shapes-wan") / "transformer")) == "shapes-wan"
    assert origin(str(quantized / "transformer")) is None
    assert origin("/gone/somewhere/else") is None
    assert origin("acme/video") == "acme/video"
    assert origin(None, None) is None
    (quantized / "README.md").write_text("---\nbase_model: acme/base\n---\n")
    assert origin("acme/video") == "acme/base"
    assert origin(str(plain)) == origin(plain) == str(plain)
    assert origin("x" * 5000) == origin("a\0b") == "acme/base"
    (plain / "transformer/config.json").write_text("{")
    assert origin(str(plain)) == "acme/base"
    (quantized / "README.md").write_text(f"---\nbase_model: {'y' * 5000}\n---\n")
    assert origin(str(plain)) is None
