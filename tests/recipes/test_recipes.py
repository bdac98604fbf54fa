import json
from dataclasses import replace

import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.models import BlockLinear, block_linears, family_of
from s2q.planning.resolve import allocation_schemes, resolve
from s2q.recipes.load import load_recipe, recipe_names
from s2q.recipes.methods import is_rival, methods
from s2q.recipes.schema import Recipe
from tiny import tiny_transformer


@pytest.fixture(scope="module")
def linears():
    with torch.device("meta"):
        transformer = tiny_transformer()
    return block_linears(transformer, family_of(transformer))


def schemes_of(recipe, linears):
    return {linear.name: linear.scheme for linear in resolve(recipe, linears)}


def test_the_recipes_of_the_package():
    assert set(recipe_names()) >= {"rtn-w8a8", "rtn-w4a8", "rtn-w4a6", "rtn-w4a4", "rtn-w4a16"}


@pytest.mark.parametrize("name", recipe_names())
def test_every_packaged_recipe_is_valid_and_called_what_it_is(name, linears):
    budget = ["allocation.budget=9"] if load_recipe(name).allocation else []  # the published ones are for wide models
    recipe = load_recipe(name, overrides=budget)
    assert recipe.name == name
    assert recipe.description
    activation = 16 if recipe.activations is None else recipe.activations.num_bits
    assert name.endswith(f"-w{recipe.weights.num_bits}a{activation}")
    assert recipe.linear_scheme().simulated == name.startswith(("q-dit-", "orbitquant-"))
    assert recipe.description.startswith("experimental:") == name.startswith(("deltaquant-", "orbitquant-"))
    assert set(schemes_of(recipe, linears)) == {linear.name for linear in linears}


@pytest.mark.parametrize("name", recipe_names())
def test_a_resolved_recipe_survives_json_and_loads_to_the_same(name, tmp_path):
    recipe = load_recipe(name)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe.resolved()))
    assert load_recipe(path) == load_recipe(recipe.resolved()) == load_recipe(recipe) == recipe


def test_a_recipe_that_extends_another_has_its_own_keys_in_the_groups_of_the_other():
    own = {
        "extends": "s2q-w4a6",
        "name": "mine",
        "activations": {"num_bits": 5},
        "rounding": {"block_size": 64},
        "outer": {"num_bits": 8},
    }
    recipe, other = load_recipe(own), load_recipe("s2q-w4a6")
    assert (recipe.activations.num_bits, recipe.outer.num_bits, recipe.description) == (5, 8, "")
    assert recipe.rounding == replace(other.rounding, block_size=64)
    same = {"weights", "modulation", "calibration", "transforms", "clip", "loss", "distillation", "skip"}
    assert all(getattr(recipe, group) == getattr(other, group) for group in same)
    assert "extends" not in recipe.resolved()
    assert own["extends"] == "s2q-w4a6"


def test_extending_goes_on_and_null_takes_a_group_away():
    recipe = load_recipe({"extends": "smoothquant-w4a8", "name": "mine", "modulation": None})
    assert (recipe.linear_scheme().name, recipe.transforms.scale, recipe.modulation) == ("w4a8", "smooth", None)
    assert load_recipe({"extends": "rtn-w4a16", "name": "mine", "activations": {"num_bits": 6}}).activations


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"extends": "s2q-w4a6"}, "missing key 'name'"),
        (
            {"extends": "s2q-w4a7", "name": "mine"},
            r"recipe mine: extends: unknown recipe 's2q-w4a7': s2q has the widths w3a6, w4a4, w4a6, w4a8, w8a8",
        ),
        ({"extends": ["s2q-w4a6"], "name": "mine"}, r"recipe mine: extends=\['s2q-w4a6'\]: .*a built-in recipe"),
        ({"extends": "s2q-w4a6", "name": "mine", "rounding": {"metod": "rtn"}}, r"unknown key 'rounding\.metod'"),
    ],
)
def test_an_extension_without_name_base_or_known_keys_is_refused(content, message):
    with pytest.raises(InvalidInputError, match=message):
        load_recipe(content)


def test_modulation_is_weight_only_at_4_bits_by_default(linears):
    schemes = schemes_of(load_recipe({"name": "mine", "weights": {"num_bits": 8}}), linears)
    modulation = {schemes[linear.name].name for linear in linears if linear.role == "modulation"}
    others = {schemes[linear.name].name for linear in linears if linear.role == "linear"}
    assert (modulation, others) == ({"w4a16"}, {"w8a16"})


def test_modulation_null_leaves_those_linears_untouched(linears):
    recipe = load_recipe("rtn-w4a6", overrides=["modulation=null"])
    assert set(schemes_of(recipe, linears)) == {linear.name for linear in linears if linear.role == "linear"}


def test_overrides_change_one_value_and_nothing_else():
    base = load_recipe("rtn-w4a6").resolved()
    changed = load_recipe("rtn-w4a6", overrides=["weights.num_bits=3", "activations.num_bits=5"]).resolved()
    base["weights"]["num_bits"], base["activations"]["num_bits"] = 3, 5
    assert changed.pop("description").endswith("per token; changed: weights.num_bits=3, activations.num_bits=5.")
    assert base.pop("description").endswith("per token.")
    assert changed == base


def test_an_override_makes_a_group_that_is_null():
    assert load_recipe("rtn-w4a16", overrides=["activations.num_bits=8"]).linear_scheme().name == "w4a8"


def test_group_sizes_reach_the_schemes(linears):
    recipe = load_recipe("rtn-w4a16", overrides=["weights.granularity=per_group", "weights.group_size=16"])
    schemes = schemes_of(recipe, linears)
    assert {schemes[one.name].name for one in linears if one.role == "linear"} == {"w4g16a16"}


def test_group_size_that_does_not_divide_names_the_linear_and_what_would_do(linears):
    recipe = load_recipe("rtn-w4a16", overrides=["weights.granularity=per_group", "weights.group_size=100"])
    message = r"transformer_blocks\.0\.attn1\.to_q: in_features=64 is not divisible by group_size=100; use 16, 32, 64"
    with pytest.raises(InvalidInputError, match=message):
        schemes_of(recipe, linears)


def test_skipped_linears_are_not_quantized(linears):
    recipe = load_recipe("rtn-w4a6", overrides=["skip=['transformer_blocks.0.*', '*.ff.net.2']"])
    schemes = schemes_of(recipe, linears)
    assert set(schemes) == {
        linear.name for linear in linears if linear.block != 0 and not linear.name.endswith("ff.net.2")
    }


def test_a_skip_pattern_that_matches_nothing_is_an_error(linears):
    with pytest.raises(InvalidInputError, match=r"skip pattern 'transformer_block\.0\.\*' matches none"):
        schemes_of(load_recipe("rtn-w4a6", overrides=["skip=[transformer_block.0.*]"]), linears)


def test_zero_targets_is_an_error(linears):
    with pytest.raises(InvalidInputError, match="none of the 16 linears is left to quantize"):
        schemes_of(load_recipe("rtn-w4a6", overrides=["skip=['*']"]), linears)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rtm-w4a6", "unknown recipe 'rtm-w4a6': nearest names are rtn-w4a6"),
        ("rtn-w4a7", "unknown recipe 'rtn-w4a7': rtn has the widths w4a16, w4a4, w4a6, w4a8, w8a8$"),
        ("vidit-q-mp-w8a8", "unknown recipe 'vidit-q-mp-w8a8': vidit-q-mp has the widths w4a4, w4a6, w4a8$"),
        ("s2q", "unknown recipe 's2q': names a method without a bit width; add w3a6, w4a4, w4a6, w4a8, w8a8$"),
    ],
)
def test_unknown_names_list_the_nearest_or_the_widths_of_the_method(name, message):
    with pytest.raises(InvalidInputError, match=message):
        load_recipe(name)


def test_a_method_has_a_file_and_a_width_is_a_suffix():
    assert {name.rpartition("-")[0] for name in recipe_names()} == set(methods())
    assert all("name" not in content for content in methods().values())
    recipe = load_recipe("s2q-w3a6")
    assert (recipe.weights.num_bits, recipe.activations.num_bits, recipe.modulation.num_bits) == (3, 6, 4)
    assert load_recipe("rtn-w4a16").activations is None
    assert load_recipe("q-dit-w8a8").allocation.budget == 8.125
    assert load_recipe("quarot-w4a8").clip.constant is None


def test_every_method_is_a_rival_except_that_of_the_paper_and_what_the_package_adds():
    original = {name.rpartition("-")[0] for name in recipe_names() if not is_rival(name)}
    assert original == {"s2q", "s2q-plus", "s2q-table", "s2q-export", "s2q-export-branch", "s2q-export-table", "table"}
    assert not is_rival("mine")


def test_a_changed_recipe_does_not_change_the_next_one():
    changed = load_recipe("s2q-w4a6", overrides=["transforms.alpha=0.7"])
    assert (changed.transforms.alpha, load_recipe("s2q-w4a6").transforms.alpha) == (0.7, 0.5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["weights.nun_bits=4"], r"unknown key 'weights\.nun_bits'; nearest keys are weights\.num_bits"),
        (["weight.num_bits=4"], r"unknown key 'weight'; nearest keys are weights"),
        (["skipp=[]"], "unknown key 'skipp'; nearest keys are skip"),
        (["weights.num_bits=9"], r"weights\.num_bits=9; expected at least 2, at most 8"),
        (["weights.num_bits=1"], r"weights\.num_bits=1; expected at least 2, at most 8"),
        (["activations.num_bits=16"], r"activations\.num_bits=16; expected at least 2, at most 8"),
        (["weights.num_bits=four"], r"weights\.num_bits='four': input should be a valid integer"),
        (["weights.num_bits=4.0"], r"weights\.num_bits=4\.0: input should be a valid integer"),
        (["weights.num_bits=true"], r"weights\.num_bits=True: input should be a valid integer"),
        (["weights.granularity=per_chanel"], "expected one of per_channel, per_group; the nearest is per_channel"),
        (["weights.granularity=per_group"], "granularity=per_group needs a group_size"),
        (["weights.group_size=64"], "group_size=64 needs granularity=per_group"),
        (["rounding.method=rtm"], r"rounding\.method='rtm'; expected one of rtn, gptq, adaround; the nearest is rtn"),
        (["weights=null"], "weights=None"),
        (["name.x=1"], "'name' is not a group of keys"),
        (["no-equals"], "expected key=value"),
        (["=4"], "expected key=value"),
        (["weights.num_bits=[4"], "not valid YAML"),
    ],
)
def test_invalid_values_say_what_would_be_valid(overrides, message):
    with pytest.raises(InvalidInputError, match=message) as caught:
        load_recipe("rtn-w4a6", overrides=overrides)
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named():
    with pytest.raises(InvalidInputError, match="missing key 'weights'"):
        load_recipe({"name": "mine"})


@pytest.mark.parametrize("content", ["- a\n- b\n", "{", "\t", ""])
def test_files_that_are_no_recipe(tmp_path, content):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(InvalidInputError, match=r"mine\.yaml"):
        load_recipe(path)


def test_a_missing_recipe_file_is_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="no such recipe file"):
        load_recipe(str(tmp_path / "none.yaml"))


def test_yaml_cannot_run_code(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(InvalidInputError, match="the tag .* is not supported"):
        load_recipe(path)


def test_recipes_are_immutable():
    recipe = load_recipe("rtn-w4a6")
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "other"
    assert isinstance(recipe, Recipe)


@pytest.mark.parametrize(
    ("overrides", "calibrates"),
    [
        ([], False),
        (["transforms.rotation=hadamard"], False),
        (["transforms.rotation=kronecker"], False),
        (["clip.constant=0.9", "transforms.rotation=hadamard", "weights.levels=lloyd_max"], False),
        (["transforms.scale=smooth"], True),
        (["transforms.shift=mean"], True),
        (["transforms.low_rank=4"], True),
        (["rounding.method=gptq"], True),
        (["modulation.rounding=gptq"], True),
        (["transforms.rotation=kronecker", "distillation.epochs=1"], True),
    ],
)
def test_a_recipe_calibrates_if_one_of_its_parts_needs_samples(overrides, calibrates):
    assert load_recipe("rtn-w4a6", overrides=overrides).calibrates == calibrates


def test_levels_that_do_not_exist_name_the_nearest():
    with pytest.raises(
        InvalidInputError, match=r"weights\.levels='loyd_max'; expected one of .*; the nearest is lloyd_max"
    ):
        load_recipe("rtn-w4a6", overrides=["weights.levels=loyd_max"])


def test_text_linears_are_never_given_differences_from_local_means():
    changes = ["allocation.what=weight_bits", "allocation.candidates=[4, 8]", "allocation.budget=5"]
    recipe = load_recipe("deltaquant-w4a6", overrides=changes)
    names = {"name": "block.to_add", "inner_name": "to_add", "block": 0, "role": "linear"}
    for sees_text in (False, True):
        linear = BlockLinear(**names, in_features=64, out_features=64, has_bias=True, sees_text=sees_text)
        schemes = allocation_schemes(recipe, linear)
        assert {bits: scheme.needs_grid for bits, scheme in schemes.items()} == {4: not sees_text, 8: not sees_text}


def test_an_error_about_activations_set_to_null_names_an_override_that_suffices():
    clipped = [name for name in recipe_names() if load_recipe(name).clip.activations or load_recipe(name).clip.constant]
    assert {"s2q-plus-w4a8", "quarot-w4a4"} <= set(clipped)
    for name in clipped:
        with pytest.raises(InvalidInputError, match=r"set clip\.\w+=\w+, or activations\.num_bits") as caught:
            load_recipe(name, overrides=["activations=null"])
        override = str(caught.value).partition("; set ")[2].partition(",")[0]
        assert load_recipe(name, overrides=["activations=null", override]).activations is None
