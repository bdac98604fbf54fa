"""docs/extending.md shows the code that these tests run."""

import re
from pathlib import Path

import pytest

from extending.mse_rounding import MSE
from s2q.models import skyreels_v2
from s2q.recipes import load_recipe, methods
from s2q.recipes.strict_yaml import parse_yaml
from s2q.rounding import ROUNDINGS

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs/extending.md"
LEAVES = sorted(path for path in HERE.glob("*.py") if not path.name.startswith("test_")) + [Path(skyreels_v2.__file__)]


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda path: path.name)
def test_the_page_shows_every_leaf_unchanged(leaf):
    assert leaf.read_text() in PAGE.read_text()


def test_the_method_of_the_page_is_a_recipe_at_each_of_its_widths(monkeypatch):
    text = re.search(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    known = methods.methods()
    monkeypatch.setattr(methods, "methods", lambda: {**known, "name": parse_yaml(text, where="page")})
    monkeypatch.setitem(ROUNDINGS, "mse", MSE)
    recipe = load_recipe("name-w4a6")
    assert (recipe.weights.num_bits, recipe.activations.num_bits, recipe.rounding) == (4, 6, MSE())
    assert recipe.description == "SmoothQuant scale, MSE rounding; 4-bit weights, 6-bit activations."
    assert recipe.transforms.scale == "smooth"
    assert load_recipe("name-w4a8").activations.num_bits == 8
