"""Quantizing while loading: equal to a run, streamed, saved as a checkpoint, and text encoders."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel, DiffusionPipeline
from safetensors.torch import save_file
from torch import nn
from transformers import T5EncoderModel

import s2q
from s2q.checkpoint import S2QConfig
from s2q.common.errors import InvalidInputError
from s2q.nn import EncoderLinear, PackedLinear
from s2q.run import while_loading
from tiny import run_pipeline, tiny_pipeline


def packed(module):
    return [name for name, part in module.named_modules() if isinstance(part, PackedLinear)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder of a full-precision pipeline, its checkpoint by a run, and the pipeline quantized while loading."""
    folder = tmp_path_factory.mktemp("loading")
    pipe = tiny_pipeline("cogvideox", dtype=torch.bfloat16)
    pipe.save_pretrained(folder / "full", max_shard_size="20KB")
    s2q.quantize(folder / "full", recipe="table-w4a8", out=folder / "run")
    loaded = CogVideoXPipeline.from_pretrained(
        folder / "full", quantization_config=s2q.Config("table-w4a8"), dtype=torch.bfloat16
    )
    loaded.set_progress_bar_config(disable=True)
    return SimpleNamespace(full=folder / "full", run=folder / "run", loaded=loaded, pipe=pipe)


def test_a_transformer_equals_that_of_a_run(model):
    run = CogVideoXTransformer3DModel.from_pretrained(model.run / "transformer", dtype=torch.bfloat16)
    ours, theirs = model.loaded.transformer.state_dict(), run.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert isinstance(model.loaded.transformer.config.quantization_config, S2QConfig)


def write_shards(transformer, folder, *, last):
    """Save a transformer in two files, the second of which has the tensors of some of its modules."""
    transformer.save_config(folder)
    names, weight_map = ("model-1.safetensors", "model-2.safetensors"), {}
    for index, file in enumerate(names):
        state = {
            name: value for name, value in transformer.state_dict().items() if name.startswith(last) == bool(index)
        }
        save_file(state, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(state, file)
    content = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(content)


@pytest.mark.parametrize("overrides", [[], ["outer=null"], ["modulation.correct_bias=false"]])
def test_biases_are_corrected_wherever_the_embeddings_of_timesteps_are(tmp_path, overrides):
    pipe = tiny_pipeline("cogvideox", dtype=torch.bfloat16)
    write_shards(pipe.transformer, tmp_path, last="time_embedding.")
    s2q.quantize(pipe, recipe="table-w4a8", overrides=overrides, out=tmp_path / "run")
    run = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "run/transformer", dtype=torch.bfloat16).state_dict()
    ours = CogVideoXTransformer3DModel.from_pretrained(
        tmp_path, quantization_config=s2q.Config("table-w4a8", overrides=overrides), dtype=torch.bfloat16
    ).state_dict()
    assert ours.keys() == run.keys()
    assert [name for name in ours if not torch.equal(ours[name], run[name])] == []


def test_it_is_saved_and_loaded_as_a_checkpoint(model, tmp_path):
    transformer = model.loaded.transformer
    transformer.save_pretrained(tmp_path)
    again = CogVideoXTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.config.quantization_config.to_dict() == transformer.config.quantization_config.to_dict()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in transformer.state_dict().items())
    assert not packed(again.dequantize())


def test_a_text_encoder_is_packed_and_close_to_full_precision(model):
    encoder = model.loaded.text_encoder
    modules = model.pipe.text_encoder.named_modules()
    linears = [name for name, part in modules if isinstance(part, nn.Linear) and part.in_features % 16 == 0]
    assert linears
    assert packed(encoder) == [f"{name}.packed" for name in linears]
    assert all(encoder.get_submodule(name).packed.scheme.name == "w4tg16a16" for name in linears)
    ids = torch.arange(1, 9).unsqueeze(0)
    full, quantized = (part(ids)[0].float() for part in (model.pipe.text_encoder, encoder))
    assert 0 < float((quantized - full).norm() / full.norm()) < 0.2


def test_the_pipeline_generates(model):
    found, full = run_pipeline(model.loaded), run_pipeline(model.pipe)
    assert bool(torch.isfinite(found).all())
    assert float((found.float() - full.float()).norm() / full.float().norm()) < 0.3


def test_linears_are_quantized_before_the_others_have_been_read(model, monkeypatch):
    largest, count, waiting, add = 0, 0, set(), while_loading._Group.add

    def counted(group, name, value):
        nonlocal largest, count
        count += 1
        waiting.add(name)
        largest = max(largest, len(waiting))
        add(group, name, value)
        if not group.missing:
            waiting.difference_update(
                f"{linear.name}.{part}" for linear in group.linears for part in ("weight", "bias")
            )

    monkeypatch.setattr(while_loading._Group, "add", counted)
    CogVideoXTransformer3DModel.from_pretrained(
        model.full / "transformer", quantization_config=s2q.Config("table-w4a8")
    )
    assert not waiting
    assert largest < count / 3


def test_a_linear_that_stays_on_the_disk_is_refused(model, monkeypatch):
    kept = "transformer_blocks.0.ff.net.2.weight"
    decide = while_loading.RecipeQuantizer.check_if_quantized_param

    def without(quantizer, part, value, name, state, **rest):
        return name != kept and decide(quantizer, part, value, name, state, **rest)

    monkeypatch.setattr(while_loading.RecipeQuantizer, "check_if_quantized_param", without)
    with pytest.raises(InvalidInputError, match=rf"1 tensors were not read into memory, {kept}.*run s2q\.quantize"):
        CogVideoXTransformer3DModel.from_pretrained(
            model.full / "transformer", quantization_config=s2q.Config("table-w4a8")
        )


def test_embeddings_of_timesteps_that_stay_on_the_disk_are_refused(model, monkeypatch):
    kept = "time_embedding.linear_2.bias"
    monkeypatch.setattr(while_loading.RecipeQuantizer, "_unread_embeddings", lambda quantizer, model: [kept])
    with pytest.raises(InvalidInputError, match=rf"1 tensors were not read into memory, {kept} among them"):
        CogVideoXTransformer3DModel.from_pretrained(
            model.full / "transformer", quantization_config=s2q.Config("table-w4a8")
        )


def test_components_and_overrides_are_those_that_were_asked_for(model):
    config = s2q.Config("rtn-w4a8", overrides=["outer.num_bits=8"], components=["transformer"], seed=3)
    pipe = DiffusionPipeline.from_pretrained(model.full, quantization_config=config)
    assert packed(pipe.transformer)
    assert not packed(pipe.text_encoder)
    assert "patch_embed.text_proj" in packed(pipe.transformer)
    assert not isinstance(pipe.vae, EncoderLinear)


def test_a_pattern_of_skip_names_a_linear_of_either_transformer(tmp_path):
    pipe = tiny_pipeline("wan", boundary_ratio=0.9)
    pipe.save_pretrained(tmp_path)
    skipped = ["blocks.0.attn1.to_q", "transformer_2.blocks.0.ffn.net.2"]
    config = s2q.Config("rtn-w4a8", overrides=[f"skip={skipped}"])
    loaded = DiffusionPipeline.from_pretrained(tmp_path, quantization_config=config)
    first, second = packed(loaded.transformer), packed(loaded.transformer_2)
    assert "blocks.0.attn1.to_q" not in first
    assert "blocks.0.ffn.net.2" in first
    assert "blocks.0.attn1.to_q" in second
    assert "blocks.0.ffn.net.2" not in second


def test_a_text_encoder_without_a_linear_that_the_recipe_fits_is_refused(model):
    config = s2q.Config("table-w4a8", overrides=["weights.group_size=256"], components=["text_encoder"])
    with pytest.raises(
        InvalidInputError, match=r"recipe table-w4a8: w4tg256a16 fits none of the linears.*; change weights"
    ):
        DiffusionPipeline.from_pretrained(model.full, quantization_config=config)


def test_a_text_encoder_is_saved_and_loaded_as_that_of_a_checkpoint(model, tmp_path):
    encoder = model.loaded.text_encoder
    encoder.save_pretrained(tmp_path)
    again = T5EncoderModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert packed(again) == packed(encoder)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in encoder.state_dict().items())


def test_a_text_encoder_has_the_weights_that_the_recipe_has_for_it(model):
    overrides = ["text_encoder.num_bits=8"]
    config = s2q.Config("table-w4a8", overrides=overrides, components=["text_encoder"])
    pipe = DiffusionPipeline.from_pretrained(model.full, quantization_config=config)
    assert {part.packed.scheme.name for part in pipe.text_encoder.modules() if isinstance(part, EncoderLinear)} == {
        "w8a16"
    }


def test_a_recipe_that_calibrates_is_refused_in_a_line():
    with pytest.raises(InvalidInputError, match=r"recipe s2q-w4a6 calibrates.*run s2q\.quantize.*table-w4a8") as error:
        s2q.Config("s2q-w4a6")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "tabel-w4a8"}, "table-w4a8"),
        ({"recipe": "table-w4a8", "seed": -1}, "seed"),
        ({"recipe": "table-w4a8", "components": "transformer"}, "components"),
        ({"recipe": "table-w4a8", "components": ["vae"]}, r"unknown component 'vae'.*text_encoder"),
        ({"recipe": "table-w4a8", "overrides": ["weights.group_sise=16"]}, "group_size"),
    ],
)
def test_arguments_are_checked_before_a_file_is_read(arguments, message):
    with pytest.raises(InvalidInputError, match=message):
        s2q.Config(**arguments)


def test_a_checkpoint_is_not_quantized_again(model):
    with pytest.raises(InvalidInputError, match=r"its transformer is already quantized \(by s2q\); pass the full"):
        CogVideoXTransformer3DModel.from_pretrained(
            model.run / "transformer", quantization_config=s2q.Config("rtn-w4a8"), dtype=torch.bfloat16
        )
    pipe = CogVideoXPipeline.from_pretrained(
        model.run, quantization_config=s2q.Config("rtn-w4a8", components=["text_encoder"]), dtype=torch.bfloat16
    )
    assert pipe.transformer.config.quantization_config.recipe == "table-w4a8"
