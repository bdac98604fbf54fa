"""Every option of the schema: what is refused, and what the message says."""

import functools
import json
from dataclasses import MISSING, fields, is_dataclass

import pytest

from s2q.common.errors import InvalidInputError
from s2q.common.options import OptionError, Options
from s2q.core.schemes import ActivationOptions, Delta, WeightOptions
from s2q.recipes.load import load_recipe
from s2q.recipes.schema import Recipe
from s2q.rounding import GPTQ, RTN, AdaRound

COMPLETE = {
    "name": "complete",
    "attention": {"num_bits": 8},
    "weights": {"num_bits": 4},
    "activations": {"num_bits": 4, "delta": {}},
    "outer": {"num_bits": 8},
    "text_encoder": {"num_bits": 8},
    "distillation": {},
    "refinement": {},
    "clip": {"weights": True},
    "allocation": {"what": "weight_bits", "candidates": [4, 8], "budget": 5},
}


def options_of(owner, prefix=""):
    """Path, field and value of every option of a recipe."""
    names = type(owner).model_fields if isinstance(owner, Recipe) else [option.name for option in fields(owner)]
    ranges = {} if isinstance(owner, Recipe) else {option.name: option for option in fields(owner)}
    for name in names:
        value = getattr(owner, name)
        if is_dataclass(value):
            yield from options_of(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", ranges.get(name), value


@functools.cache
def recipes():
    """A recipe that has every group, for each rounding that has options."""
    adaround = {**COMPLETE, "clip": {}, "rounding": {"method": "adaround"}}
    return {"gptq": load_recipe({**COMPLETE, "rounding": {"method": "gptq"}}), "adaround": load_recipe(adaround)}


OPTIONS = {path: (method, field, value) for method, one in recipes().items() for path, field, value in options_of(one)}
GROUPED = {path: option for path, option in OPTIONS.items() if "." in path}
RANGED = {path: option for path, option in GROUPED.items() if {"ge", "gt", "le", "lt"} & set(option[1].metadata)}
OUTSIDE = {"ge": lambda bound: bound - 1, "gt": lambda bound: bound, "le": lambda bound: bound + 1, "lt": lambda b: b}
WORDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def refusal(method, override):
    with pytest.raises(InvalidInputError) as caught:
        load_recipe(recipes()[method], overrides=[override])
    message = str(caught.value)
    assert message.startswith("recipe complete: ")
    assert "\n" not in message
    return message


def test_the_table_has_the_options_of_every_group():
    groups = {path.rpartition(".")[0] for path in GROUPED}
    assert groups == {*Recipe.model_fields, "activations.delta"} - {"name", "description", "skip"}
    assert len(OPTIONS) > 50


@pytest.mark.parametrize("path", GROUPED)
def test_a_misspelt_key_is_refused_with_the_key_it_is_nearest_to(path):
    message = refusal(OPTIONS[path][0], f"{path}x=1")
    assert f"unknown key '{path}x'; nearest keys are " in message
    assert path in message.partition("nearest keys are ")[2].split(", ")


@pytest.mark.parametrize("path", OPTIONS)
def test_a_value_of_another_type_is_refused_with_the_key_and_the_value(path):
    message = refusal(OPTIONS[path][0], f"{path}={{other: [thing]}}")
    assert f"{path}={{'other': ['thing']}}" in message
    assert "expected " in message or "should be a valid" in message


@pytest.mark.parametrize("path", [path for path, (_, _, value) in OPTIONS.items() if type(value) in (int, float)])
def test_a_number_as_text_is_not_converted(path):
    message = refusal(OPTIONS[path][0], f"{path}='{OPTIONS[path][2]}'")
    assert f"{path}='{OPTIONS[path][2]}'" in message


@pytest.mark.parametrize("path", RANGED)
def test_a_value_out_of_range_is_refused_with_the_range(path):
    method, field, _ = OPTIONS[path]
    for kind, outside in OUTSIDE.items():
        if kind in field.metadata:
            bound = field.metadata[kind]
            message = refusal(method, f"{path}={outside(bound)}")
            assert message.startswith(f"recipe complete: {path}={outside(bound)}")
            assert f"{WORDS[kind]} {bound}" in message


@pytest.mark.parametrize("path", [path for path, option in GROUPED.items() if "choices" in option[1].metadata])
def test_a_name_out_of_no_table_is_refused_with_all_that_there_are(path):
    method, field, value = OPTIONS[path]
    message = refusal(method, f"{path}={value}x")
    assert f"{path}='{value}x'; expected one of {', '.join(field.metadata['choices'])}" in message
    assert message.endswith(f"the nearest is {value}")


@pytest.mark.parametrize("text", [".nan", ".inf", "-.inf"])
def test_numbers_are_finite(text):
    for path, (method, _, value) in GROUPED.items():
        if type(value) is float:
            assert path in refusal(method, f"{path}={text}")


@pytest.mark.parametrize(
    "text",
    [
        "rounding:\n  method: gptq\n  block_size: 64\n  block_size: 128\n",
        "rounding:\n\tmethod: gptq\n",
    ],
)
def test_duplicate_keys_and_tabs_are_refused_with_the_line(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\nweights: {{num_bits: 4}}\n{text}")
    with pytest.raises(InvalidInputError, match=r"mine\.yaml: line (4|6)"):
        load_recipe(path)


def test_a_number_with_an_exponent_is_a_number_in_files_and_overrides(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nweights: {num_bits: 4}\nrounding: {method: gptq, dampening_frac: 1e-3}\n")
    assert load_recipe(path).rounding == GPTQ(dampening_frac=1e-3)
    assert load_recipe(path, overrides=["rounding.dampening_frac=5e-2"]).rounding.dampening_frac == 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: WeightOptions(num_bits=9), "WeightOptions: num_bits=9; expected at least 2, at most 8"),
        (lambda: ActivationOptions(num_bits=4, group_size=8), "ActivationOptions: group_size=8 needs granularity"),
        (lambda: Delta(cube=(2, 2, 0)), r"Delta: cube=\(2, 2, 0\); expected three whole numbers"),
        (lambda: AdaRound(warmup=1.0), "AdaRound: warmup=1.0; expected at least 0, below 1"),
    ],
)
def test_options_made_in_python_have_the_same_ranges(options, message):
    with pytest.raises(OptionError, match=message):
        options()


def test_a_recipe_holds_the_very_options_that_the_functions_take():
    recipe = load_recipe({"name": "mine", "weights": {"num_bits": 4}, "rounding": GPTQ(block_size=3)})
    assert recipe.rounding == GPTQ(block_size=3)
    for _, group in recipe:
        assert not is_dataclass(group) or isinstance(group, Options)
    assert json.loads(json.dumps(recipe.resolved()))["rounding"] == {
        "method": "gptq", "dampening_frac": 0.01, "block_size": 3, "allow_fallback": True
    }  # fmt: skip


def test_every_option_but_those_that_a_recipe_must_say_has_a_default():
    required = {
        path for path, (_, field, _) in GROUPED.items() if field.default is MISSING and field.default_factory is MISSING
    }
    bits = {f"{group}.num_bits" for group in ("weights", "activations", "modulation", "outer", "text_encoder")}
    assert required == bits | {"allocation.what", "allocation.candidates", "allocation.budget"}


def test_a_change_of_the_rounding_leaves_the_options_of_the_other_behind():
    assert load_recipe("s2q-w4a6", overrides=["rounding.method=rtn"]).rounding == RTN()
    assert load_recipe("brecq-w4a6").rounding == AdaRound()


def test_an_option_of_another_rounding_is_refused_with_that_rounding():
    message = "unknown key 'rounding.penalty'; it is an option of rounding.method=adaround; set that method, or remove"
    with pytest.raises(InvalidInputError, match=message):
        load_recipe("s2q-w4a6", overrides=["rounding.penalty=5"])


@pytest.mark.parametrize(
    "override", ["rounding.block_size=128", "rounding.block_size=64", "rounding={method: rtn, block_size: 128}"]
)
def test_an_override_of_another_rounding_is_refused_whatever_its_value(override):
    with pytest.raises(InvalidInputError, match=r"unknown key 'rounding.block_size'; .* rounding.method=gptq"):
        load_recipe("rtn-w4a6", overrides=[override])


def test_modulation_shares_the_options_of_a_rounding_of_its_method():
    recipe = load_recipe("s2q-w4a6", overrides=["rounding.dampening_frac=0.05"])
    assert recipe.modulation_rounding is recipe.rounding
    assert load_recipe("vidit-q-w4a6").modulation_rounding == GPTQ()
    assert load_recipe("rtn-w4a6", overrides=["modulation=null"]).modulation_rounding == RTN()


OLD = {
    **{"method": "rtn", "dampening_frac": 0.01, "block_size": 128, "act_order": True, "max_retries": 4},
    **{"allow_fallback": False, "penalty": 1000.0, "warmup": 0.2, "beta_start": 20.0, "beta_end": 2.0},
}
"""The rounding of the recipe.json of a checkpoint of version 0.1."""


def test_recipes_of_old_checkpoints_load():
    old = load_recipe("rtn-w4a6").resolved()
    for allow_fallback in (False, True):
        old["rounding"], old["clip"]["start"] = OLD | {"allow_fallback": allow_fallback}, 4.0
        assert load_recipe(old) == load_recipe("rtn-w4a6")
    old = load_recipe("s2q-w4a6").resolved()
    old["distillation"]["weight_decay"] = 0.0
    old["rounding"] = OLD | {"method": "gptq", "allow_fallback": True}
    assert load_recipe(old) == load_recipe("s2q-w4a6")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounding.act_order=false", "rounding.act_order=False: no longer an option, always True; remove it"),
        ("rounding.max_retries=2", "rounding.max_retries=2: no longer an option, always 4; remove it"),
        ("clip.start=2.0", r"clip.start=2.0: no longer an option, always 4.0; remove it"),
        ("distillation.weight_decay=0.1", r"distillation.weight_decay=0.1: no longer an option, always 0.0"),
    ],
)
def test_options_that_there_were_are_refused_with_what_holds_now(override, message):
    with pytest.raises(InvalidInputError, match=message):
        load_recipe("s2q-w4a6", overrides=[override])
