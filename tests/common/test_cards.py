"""The front matter of model cards."""

import pytest

from s2q.common.cards import front_matter, split_card


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\n---\n# Model\n---\n", ("license: mit\n", "# Model\n---\n")),
        ("---\ntext: a --- b\n--- \n\nMore", ("text: a --- b\n", "\nMore")),
        ("---\n---\n", ("", "")),
        ("# Model\n\n---\nlicense: mit\n---\n", (None, "# Model\n\n---\nlicense: mit\n---\n")),
        ("---\nlicense: mit\n", (None, "---\nlicense: mit\n")),
        ("", (None, "")),
    ],
)
def test_a_card_is_split_into_front_matter_and_text(card, expected):
    assert split_card(card) == expected


@pytest.mark.parametrize("card", ["", "# Model", "---\n: [\n---\n", "---\n- 1\n---\n", "---\n---\n"])
def test_front_matter_that_is_no_mapping_is_empty(card):
    assert front_matter(card) == {}
