"""What each target stores, and the words in which it refuses the rest."""

from dataclasses import replace

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from exported import CONVROT
from s2q.checkpoint import S2QConfig
from s2q.common.errors import InvalidInputError
from s2q.core.input_path import InputPath
from s2q.core.schemes import Delta, LinearScheme
from s2q.exports.target import LinearForm, check_rotation, check_storable, linear_forms
from s2q.exports.targets import TARGETS
from s2q.models import family_of
from s2q.models.family import token_layout
from s2q.planning.resolve import recipe_linears, resolve
from s2q.recipes.load import load_recipe, recipe_names
from schemes import activations, weights
from tiny import tiny_transformer

REFUSED = {"diffusers": {f"q-vdit-{widths}" for widths in ("w4a4", "w4a6", "w4a8", "w8a8")}}
"""Targets that store all other recipes."""
STORED = {
    "comfyui": {"convrot-w4a4", "convrot-w4a8", "convrot-w8a8", "rtn-w4a16", "rtn-w8a8"}
    | {"s2q-export-w4a4", "s2q-export-w4a8", "s2q-export-w8a8", "s2q-export-table-w4a8"},
    "sdnq": {"convrot-w4a8", "convrot-w8a8", "rtn-w4a16", "rtn-w4a8", "rtn-w8a8"}
    | {"s2q-export-branch-w4a8", "s2q-export-w4a16", "s2q-export-w4a8", "s2q-export-w8a8"},
    "gguf": {"s2q-export-w4a16"},
}
"""Recipes whose checkpoints the others store, of a model whose widths fit."""


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


def form(weight, activation, *, width=64, **path):
    """A linear of 64 outputs."""
    return LinearForm(
        name="x",
        in_features=width,
        out_features=64,
        scheme=LinearScheme(weight=weight, activation=activation),
        path=InputPath(**path),
        dtype=torch.float32,
    )


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipe_is_stored_or_refused_with_a_remedy(recipe, transformer):
    forms = forms_of(recipe, transformer)
    for name, target in TARGETS.items():
        if recipe in STORED[name] if name in STORED else recipe not in REFUSED[name]:
            check_storable(target, forms, recipe="")
        else:
            with pytest.raises(InvalidInputError, match=rf"{name} cannot store .*; quantize the model with (s2q-|any)"):
                check_storable(target, forms, recipe="")


def test_recipes_that_are_recommended_are_stored():
    for name, target in TARGETS.items():
        assert set(target.recipes) <= STORED[name] if target.stores_codes else name in REFUSED
    assert set().union(*STORED.values(), *REFUSED.values()) <= set(recipe_names())


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
def test_the_part_of_a_recipe_is_named(recipe, target, part, transformer):
    with pytest.raises(InvalidInputError, match=part):
        check_storable(TARGETS[target], forms_of(recipe, transformer), recipe=recipe)


W4, W8, GROUPED = weights(4), weights(8), weights(4, group_size=32)
TABLED, SMALL = (weights(4, group_size=size, levels="fp8_table") for size in (16, 2))
A4, A6, A8 = activations(4), activations(6), activations(8)
BRANCH = {"low_rank": 4, "deflates": False}


@pytest.mark.parametrize(
    ("target", "linear", "obstacle"),
    [
        ("sdnq", form(W4, A8, low_rank=4), "a low-rank branch that is removed from the input"),
        ("sdnq", form(weights(4, levels="lloyd_max"), None), "the levels lloyd_max of its weights"),
        ("sdnq", form(W4, activations(8, delta=Delta())), "differences of its tokens"),
        ("sdnq", form(W4, activations(8, group_size=32)), "groups of its activations"),
        ("sdnq", form(W4, A6), "activations of 6 bits, but of 8 or unquantized"),
        ("sdnq", form(W4, A8, right=8), "a rotation in blocks of 8 channels"),
        (
            "sdnq",
            form(GROUPED, A8),
            "groups of weights beside quantized activations, which its readers round again",
        ),
        ("sdnq", form(W4, None, width=63), "an odd number of input channels, 63, in 4 bits"),
        (
            "sdnq",
            form(W4, A8, width=72),
            "quantized activations of a linear of 72 x 64 features, which its readers do not quantize",
        ),
        (
            "sdnq",
            form(W8, A8, width=16),
            "quantized activations of a linear of 16 x 64 features, which its readers do not quantize",
        ),
        ("comfyui", form(W4, A8, right=64, **BRANCH), "its low-rank branch"),
        ("comfyui", form(W4, A6, right=64), "activations of 6 bits beside weights of 4"),
        ("comfyui", form(W8, A4, right=64), "activations of 4 bits beside weights of 8"),
        ("comfyui", form(GROUPED, A8, right=64), "groups of 32 of weights, but a scale for each row"),
        ("comfyui", form(TABLED, A4, right=64), "groups of 16 of weights, but a scale for each row"),
        ("comfyui", form(TABLED, None, right=64), "groups of 16 of weights, but a scale for each row"),
        ("comfyui", form(weights(4, group_size=16, levels="table"), A8, right=64), "the levels table of its weights"),
        ("sdnq", form(TABLED, A8), "the levels fp8_table of its weights"),
        ("comfyui", form(SMALL, A8, right=64), "groups of 2 of 64 channels, but several of 4, 8 or a multiple of 16"),
        ("comfyui", form(TABLED, A8, right=16, width=16), "groups of 16 of 16 channels, but several of 4, 8"),
        ("comfyui", form(W4, A8), "unrotated inputs: asym_w4a8_int8 always rotates"),
        ("comfyui", form(W4, A4), "unrotated inputs: convrot_w4a4 always rotates"),
        ("comfyui", form(W4, A8, right=32), "a rotation in blocks of 32 channels, but of 4, 16, 64, 256"),
        ("comfyui", form(W4, A8, right=4, width=72), "72 input channels, no multiple of 16, as asym_w4a8_int8"),
        ("comfyui", form(W4, A4, right=16, width=96), "96 input channels, no multiple of 64, as convrot_w4a4"),
        ("comfyui", form(W4, A4, right=4), "a rotation in blocks of 4 channels as convrot_w4a4, but of 16 or more"),
        ("gguf", form(GROUPED, A8), "activations of 8 bits, since its readers compute with unquantized inputs"),
        ("gguf", form(W4, None), "one group for each row of weights, but groups of 32"),
        ("gguf", form(weights(4, group_size=64), None), "groups of 64 of weights, but groups of 32"),
        ("gguf", form(GROUPED, None, right=64), "its rotation"),
        ("diffusers", form(W4, A8, estimator=True, estimator_frames=3), "the frame scales of its estimator"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_obstacle_of_a_linear_is_named(target, linear, obstacle):
    with pytest.raises(InvalidInputError) as raised:
        check_storable(TARGETS[target], [linear], recipe="")
    stored, _, remedy = str(raised.value).partition("; ")
    assert stored.startswith(f"x: {target} cannot store {obstacle}")
    assert remedy.startswith("quantize the model with ")


@pytest.mark.parametrize(
    ("target", "linear", "kind"),
    [
        ("sdnq", form(W4, A8, right=64, **BRANCH), "int4"),
        ("sdnq", form(weights(8, group_size=32), None, width=63 * 32), "int8"),
        ("sdnq", form(W8, None, width=63), "int8"),
        ("sdnq", form(W8, A8, width=32), "int8"),
        ("sdnq", form(weights(3), A8), "int4"),
        ("sdnq", form(weights(5), A8), "int8"),
        ("comfyui", form(W4, A8, right=4), "asym_w4a8_int8"),
        ("comfyui", form(W4, A8, right=16, width=48), "asym_w4a8_int8"),
        ("comfyui", form(weights(3), A4, right=16), "convrot_w4a4"),
        ("comfyui", form(W8, A8), "int8_tensorwise"),
        ("comfyui", form(W4, None, right=4, width=68), "int8_tensorwise"),
        ("comfyui", form(TABLED, A8, right=64), "asym_w4a8_int8"),
        ("gguf", form(weights(3, group_size=32), None), "Q4_0"),
        ("gguf", form(weights(5, group_size=32), None), "Q8_0"),
        ("diffusers", form(weights(4, levels="lloyd_max"), A6, scale=True, estimator=True), "full precision"),
    ],
)
def test_what_fits_has_a_kind(target, linear, kind):
    check_storable(TARGETS[target], [linear], recipe="")
    assert TARGETS[target].kind(linear) == kind


def test_the_remedy_is_another_recipe_than_that_which_failed(transformer):
    forms = [replace(each, path=InputPath(scale=True)) for each in forms_of(CONVROT, transformer)]
    remedy = "; quantize the model with s2q-export-branch-w4a8 or s2q-export-w8a8, or export to diffusers$"
    with pytest.raises(InvalidInputError, match=remedy):
        check_storable(TARGETS["sdnq"], forms, recipe="s2q-export-w4a8")
    with pytest.raises(InvalidInputError, match="; export to diffusers$"):
        check_storable(TARGETS["gguf"], forms, recipe="s2q-export-w4a16")


@pytest.mark.parametrize("target", ["comfyui", "sdnq"])
def test_linears_of_widths_that_do_not_fit_are_to_be_skipped(transformer, target):
    forms = forms_of(CONVROT, transformer)
    wide = [replace(each, in_features=each.in_features + 4) if "ff.net.2" in each.name else each for each in forms]
    first = next(each.name for each in forms if "ff.net.2" in each.name)
    remedy = r"quantize the model with skip=\['transformer_blocks\.\*\.ff\.net\.2'\], or export to diffusers$"
    with pytest.raises(InvalidInputError, match=rf"^{first}: {target} cannot store .*; {remedy}"):
        check_storable(TARGETS[target], wide, recipe=CONVROT)


def test_another_rotation_of_the_same_order_is_refused(made):
    checkpoint = made("cogvideox", CONVROT)
    model = CogVideoXTransformer3DModel.from_pretrained(checkpoint, subfolder="transformer")
    forms = linear_forms(model, model.config.quantization_config)
    rotated = next(each for each in forms if each.rotation)
    layer = model.get_submodule(rotated.name)
    check_rotation(layer, rotated, TARGETS["sdnq"], recipe=CONVROT)
    layer.transform_right = torch.nn.Parameter(layer.transform_right.flip(0), requires_grad=False)
    with pytest.raises(InvalidInputError, match=f"{rotated.name}: sdnq cannot store its rotation, whose matrix"):
        check_rotation(layer, rotated, TARGETS["sdnq"], recipe=CONVROT)
