"""What a target stores is what s2q computes; what it cannot store is refused before anything is written."""

import json
import typing
from dataclasses import replace

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file

import s2q
from s2q.checkpoint import S2QConfig, verify_manifest
from s2q.cli import export as command
from s2q.cli import run
from s2q.common.errors import InvalidInputError, S2QError
from s2q.core.input_path import InputPath
from s2q.exports import export as module
from s2q.exports.target import check_rotation, check_storable, linear_forms, missing_part
from s2q.exports.targets import TARGETS
from s2q.models import family_of
from s2q.models.family import token_layout
from s2q.planning.resolve import recipe_linears, resolve
from s2q.recipes.load import load_recipe, recipe_names
from tiny import tiny_transformer

CONVROT = "convrot-w4a8"
BRANCH = ("transforms.low_rank=8", "transforms.low_rank_from=weight", "outer={num_bits: 8}")


@pytest.fixture(scope="module")
def transformer():
    with torch.device("meta"):
        return tiny_transformer()


def forms_of(recipe, transformer):
    """The linears of a checkpoint that a recipe would give."""
    recipe = load_recipe(recipe, overrides=["allocation.budget=9"] if load_recipe(recipe).allocation else [])
    plans = resolve(recipe, recipe_linears(recipe, {"transformer": transformer}), frames=3)
    config = S2QConfig.from_schemes(
        {plan.name: plan.scheme for plan in plans},
        recipe=recipe.name,
        compute_dtype="float32",
        paths={plan.name: plan.path for plan in plans if not plan.path.empty},
        tokens=token_layout(transformer, family_of(transformer)) if recipe.needs_grid else None,
    )
    return linear_forms(transformer, config)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_is_stored_or_refused_with_one_that_fits(recipe, target, transformer):
    forms = forms_of(recipe, transformer)
    if recipe in target.recipes:
        check_storable(target, forms, recipe="")
        return
    if any(missing_part(target, form) for form in forms):
        with pytest.raises(
            InvalidInputError, match=rf"{target.name} cannot store .*; quantize the model with (s2q-|any)"
        ):
            check_storable(target, forms, recipe="")


@pytest.mark.parametrize(
    ("recipe", "target", "part"),
    [
        ("s2q-w4a8", "sdnq", "channel scale"),
        ("quarot-w4a8", "sdnq", "signs of its rotation"),
        ("rtn-w4a6", "sdnq", "activations of 6 bits"),
        ("convrot-w4a4", "sdnq", "activations of 4 bits"),
        ("svdquant-w4a8", "sdnq", "channel scale"),
        ("table-w4a16", "sdnq", "levels table of its weights"),
        ("orbitquant-w4a8", "sdnq", "channel scale"),
        ("q-dit-w4a8", "sdnq", "levels|groups"),
        ("brecq-w4a8", "sdnq", "clip of its activations"),
    ],
)
def test_the_part_is_named(recipe, target, part, transformer):
    with pytest.raises(InvalidInputError, match=part):
        check_storable(TARGETS[target], forms_of(recipe, transformer), recipe=recipe)


def test_the_remedy_is_another_recipe_than_that_which_failed(transformer):
    forms = [replace(form, path=InputPath(scale=True)) for form in forms_of(CONVROT, transformer)]
    remedy = "; quantize the model with s2q-export-branch-w4a8 or s2q-export-w8a8, or export to diffusers$"
    with pytest.raises(InvalidInputError, match=remedy):
        check_storable(TARGETS["sdnq"], forms, recipe="s2q-export-w4a8")
    with pytest.raises(InvalidInputError, match="; export to diffusers$"):
        check_storable(TARGETS["gguf"], forms, recipe="s2q-export-w4a16")


@pytest.mark.parametrize("target", ["comfyui", "sdnq"])
def test_linears_of_widths_that_do_not_fit_are_to_be_skipped(transformer, target):
    forms = forms_of(CONVROT, transformer)
    wide = [replace(form, in_features=form.in_features + 4) if "ff.net.2" in form.name else form for form in forms]
    first = next(form.name for form in forms if "ff.net.2" in form.name)
    remedy = r"quantize the model with skip=\['transformer_blocks\.\*\.ff\.net\.2'\], or export to diffusers$"
    with pytest.raises(InvalidInputError, match=rf"^{first}: {target} cannot store .*; {remedy}"):
        check_storable(TARGETS[target], wide, recipe=CONVROT)


def test_biases_are_compared_within_what_the_dtype_rounds(made, tmp_path, monkeypatch):
    encode = TARGETS["diffusers"].encode

    def damaged(layer, form):
        return encode(layer, form) | {"bias": layer.bias * (1 + 1e-5)}

    monkeypatch.setattr(module, "TARGETS", {"diffusers": replace(TARGETS["diffusers"], encode=damaged)})
    with pytest.raises(
        S2QError, match=r"its bias differs by .*e-0[56] .*expected at most 6\.0e-08; nothing was exported"
    ):
        s2q.export(made("cogvideox", CONVROT), to="diffusers", out=tmp_path / "out")


@pytest.mark.parametrize("target", ["sdnq", "diffusers"])
def test_int8_attention_is_refused(made, tmp_path, target):
    checkpoint = made("cogvideox", CONVROT, "attention.num_bits=8")
    with pytest.raises(InvalidInputError, match=r"attn1: .* cannot store its int8 attention; .*attention=null"):
        s2q.export(checkpoint, to=target, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_recipes_that_are_named_exist():
    for target in TARGETS.values():
        assert set(target.recipes) <= set(recipe_names()) or not target.stores_codes


def test_the_command_has_every_target():
    assert set(typing.get_args(command.Target)) == set(TARGETS)


def test_another_rotation_of_the_same_order_is_refused(made):
    checkpoint = made("cogvideox", CONVROT)
    model = CogVideoXTransformer3DModel.from_pretrained(checkpoint, subfolder="transformer")
    forms = linear_forms(model, model.config.quantization_config)
    form = next(form for form in forms if form.rotation)
    layer = model.get_submodule(form.name)
    check_rotation(layer, form, TARGETS["sdnq"], recipe=CONVROT)
    layer.transform_right = torch.nn.Parameter(layer.transform_right.flip(0), requires_grad=False)
    with pytest.raises(InvalidInputError, match=f"{form.name}: sdnq cannot store its rotation, whose matrix"):
        check_rotation(layer, form, TARGETS["sdnq"], recipe=CONVROT)


def test_blocks_whose_order_is_no_power_of_4_are_refused_by_name(transformer):
    form = next(form for form in forms_of(CONVROT, transformer) if form.rotation)
    for order in (8, 32, 128):
        for target in ("sdnq", "comfyui"):
            with pytest.raises(
                InvalidInputError, match=f"{form.name}: {target} cannot store a rotation in blocks of {order}"
            ):
                check_storable(TARGETS[target], [replace(form, path=InputPath(right=order))], recipe=CONVROT)


def test_a_dense_export_is_the_dequantized_model_without_s2q(made, tmp_path):
    checkpoint = made("cogvideox", CONVROT, *BRANCH)
    report = s2q.export(checkpoint, to="diffusers", out=tmp_path / "out")
    config = json.loads((tmp_path / "out/transformer/config.json").read_text())
    assert "quantization_config" not in config
    dense = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "out", subfolder="transformer")
    model = CogVideoXTransformer3DModel.from_pretrained(checkpoint, subfolder="transformer")
    model.dequantize()
    assert dense.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(dense.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert report.largest_difference == 0
    assert verify_manifest(tmp_path / "out") == []
    assert not (tmp_path / "out/s2q/recipe.json").exists()
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"vae", "text_encoder", "tokenizer", "scheduler"}
    assert "s2q export --to diffusers" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("overrides", [(), BRANCH], ids=["plain", "branch"])
@pytest.mark.parametrize("recipe", [CONVROT, "convrot-w8a8"])
def test_sdnqs_tensors_give_the_same_weights(made, recipe, overrides, tmp_path):
    checkpoint = made("cogvideox", recipe, *overrides)
    report = s2q.export(checkpoint, to="sdnq", out=tmp_path / "out")
    assert report.largest_difference < 5e-6  # fp32 sums in another order
    config = json.loads((tmp_path / "out/transformer/config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["use_quantized_matmul"], config["use_hadamard"]) == ("sdnq", True, True)
    tensors = load_file(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors")
    model = CogVideoXTransformer3DModel.from_pretrained(checkpoint, subfolder="transformer")
    name = "transformer_blocks.0.attn1.to_q"
    layer = model.get_submodule(name)
    weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.scale"]
    if recipe == CONVROT:
        codes = torch.stack([weight & 15, weight >> 4], dim=1).reshape(layer.out_features, -1).char() - 8
    else:
        codes, scale = weight.t(), scale.t()
    assert torch.equal(codes, layer.codes())
    assert torch.equal(scale, layer.weight_scale.unsqueeze(1))
    assert (f"{name}.svd_down" in tensors) == bool(overrides)
    others = [key for key in config["modules_quant_config"] if key.endswith("norm1.linear.")]
    assert others
    assert not config["modules_quant_config"][others[0]]["use_quantized_matmul"]


def test_sdnq_bytes_are_codes_plus_8_the_first_in_the_low_nibble():
    """The example of the format: [-8, 7, 0, -1] is 0xf0, 0x78."""
    from s2q.core.packing import pack_codes

    assert pack_codes(torch.tensor([[-8, 7, 0, -1]], dtype=torch.int8), num_bits=4).tolist() == [[0xF0, 0x78]]


@pytest.mark.parametrize("target", ["diffusers", "sdnq"])
def test_an_export_that_differs_from_the_checkpoint_is_discarded(made, target, tmp_path, monkeypatch):
    encode = TARGETS[target].encode

    def damaged(layer, form):
        tensors = encode(layer, form)
        first = next(iter(tensors))
        return tensors | {first: tensors[first].flip(0)}

    changed = dict(TARGETS)
    changed[target] = replace(TARGETS[target], encode=damaged)
    monkeypatch.setattr(module, "TARGETS", changed)
    with pytest.raises(S2QError, match="nothing was exported"):
        s2q.export(made("cogvideox", CONVROT), to=target, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command_exports_once_and_again_with_overwrite(made, tmp_path, capsys):
    checkpoint, out = made("cogvideox", CONVROT), tmp_path / "out"
    arguments = ["export", str(checkpoint), "--to", "diffusers", "-o", str(out)]
    assert run([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["target"], result["recipe"], result["output"]) == ("diffusers", CONVROT, "out")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert run(arguments) == 3
    assert "exists; pass --overwrite" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert run([*arguments, "--overwrite"]) == 0
    (out / "mine.txt").write_text("x")
    assert run([*arguments, "--overwrite"]) == 3
    assert "mine.txt" in capsys.readouterr().err


def test_what_cannot_be_exported_is_named_and_nothing_is_written(made, tiny_model, tmp_path, capsys):
    out = ["-o", str(tmp_path / "out")]
    assert run(["export", str(tiny_model), "--to", "sdnq", *out]) == 3
    assert "is not an s2q checkpoint; quantize the model first" in " ".join(capsys.readouterr().err.split())
    assert run(["export", str(made("cogvideox", "rtn-w4a6")), "--to", "sdnq", *out]) == 3
    assert "activations of 6 bits" in " ".join(capsys.readouterr().err.split())
    assert run(["export", str(made("cogvideox", CONVROT)), "--to", "onnx", *out]) == 2
    with pytest.raises(InvalidInputError, match="unknown target 'sdqn'.*sdnq"):
        s2q.export(made("cogvideox", CONVROT), to="sdqn", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
