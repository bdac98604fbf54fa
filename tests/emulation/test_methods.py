"""Every method on a GPU against the CPU, on CogVideoX and Wan.

One width a method runs the same code as all others do, except what packs and multiplies codes of a width; rounding to
nearest runs at every width for that.
"""

import pytest

from emulation import runs
from s2q.recipes.methods import methods, recipe_names

METHODS = sorted(methods())
RECIPES = [
    *(name for name in recipe_names() if name.startswith("rtn-")),
    "s2q-w3a6",
    *(f"{name}-{'w4a4' if 'w4a4' in methods()[name]['widths'] else 'w4a8'}" for name in METHODS if name != "rtn"),
]

pytestmark = pytest.mark.gpu

OVERRIDES = {  # groups that divide the tiny sizes
    "q-dit": (
        "weights.group_size=32",
        "activations.group_size=32",
        "allocation.candidates=[16,32]",
        "allocation.budget=5.0",
    )
}


def test_every_method_is_tested():
    assert {name.rpartition("-")[0] for name in RECIPES} == set(METHODS)
    assert {name for name in recipe_names() if name.startswith("rtn-")} <= set(RECIPES)


@pytest.mark.parametrize("recipe", ["s2q-w4a6", "q-vdit-w4a4"])
def test_a_gpu_calibrates_in_bf16_unless_it_is_told_otherwise(recipe, device):
    default = runs.check_against_cpu("cogvideox", recipe, device, precision=None)
    wide = runs.quantize("cogvideox", recipe, device, overrides=("calibration.precision=float32",))
    assert default.losses != wide.losses


@pytest.mark.parametrize(("recipe", "model"), runs.pairs(RECIPES, ["cogvideox", "wan"]))
def test_a_gpu_gives_what_the_cpu_gives(recipe, model, device):
    method = recipe.rpartition("-")[0]
    runs.check_against_cpu(model, recipe, device, overrides=OVERRIDES.get(method, ()))
