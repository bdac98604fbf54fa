"""S²Q-VDiT's parts added to another method by the name of the recipe."""

import pytest

from s2q.common.errors import InvalidInputError
from s2q.recipes.load import load_recipe

GROUPS = {"weights", "activations", "modulation", "outer", "calibration", "transforms", "clip", "loss", "distillation"}


def changed(name):
    """The groups in which a variant differs from its recipe."""
    recipe, base = load_recipe(name), load_recipe(name.partition("+")[0])
    assert recipe.name == name
    assert (recipe.rounding, recipe.skip) == (base.rounding, base.skip)
    return {group: getattr(recipe, group) for group in GROUPS if getattr(recipe, group) != getattr(base, group)}


def test_sds_takes_the_salient_samples_and_changes_nothing_else():
    groups = changed("vidit-q-w4a6+sds")
    assert set(groups) == {"calibration"}
    assert groups["calibration"].selection == "sds"
    assert groups["calibration"].samples == load_recipe("vidit-q-w4a6").calibration.samples


def test_std_learns_the_scale_of_a_method_that_has_one():
    groups = changed("smoothquant-w4a4+std")
    assert set(groups) == {"loss", "distillation", "transforms"}
    assert groups["transforms"].learn_scale
    assert (groups["loss"].weighting, groups["loss"].lambda_min) == ("attention", 0.5)
    assert groups["distillation"] == load_recipe("s2q-w4a4").distillation


def test_std_learns_clipping_ratios_where_there_is_no_scale():
    groups = changed("quarot-w4a4+std")
    assert set(groups) == {"loss", "distillation", "clip"}
    assert (groups["clip"].weights, groups["clip"].activations, groups["clip"].constant) == (True, True, None)


def test_variants_in_either_order_are_the_same_recipe():
    one, other = load_recipe("quarot-w4a6+sds+std"), load_recipe("quarot-w4a6+std+sds")
    assert one.description.endswith("; with +sds; with +std.")
    assert one == other.model_copy(update={"name": one.name, "description": one.description})
    assert load_recipe("quarot-w4a6+sds", overrides=["calibration.samples=8"]).calibration.samples == 8


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rtn-w4a6+sds", "needs a recipe that calibrates"),
        ("s2q-w4a4+std", "recipe s2q-w4a4: already has what \\+std adds; remove it"),
        ("quarot-w4a4+sds+sds", "already has what \\+sds adds"),
        ("quarot-w4a4+sdt", "unknown addition to recipe quarot-w4a4 'sdt'.*sds, std"),
        ("quarrot-w4a4+sds", "unknown recipe 'quarrot-w4a4'.*quarot-w4a4"),
    ],
)
def test_what_cannot_be_added_is_refused(name, message):
    with pytest.raises(InvalidInputError, match=message):
        load_recipe(name)
