"""docs/extending.md shows the code that these tests run."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs/extending.md"
LEAVES = sorted(path.name for path in HERE.glob("*.py") if not path.name.startswith("test_"))


@pytest.mark.parametrize("leaf", LEAVES)
def test_the_page_shows_every_leaf_unchanged(leaf):
    assert (HERE / leaf).read_text() in PAGE.read_text()
