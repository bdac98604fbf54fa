import pytest

from s2q.common.differences import differences

BEFORE = {
    "seed": "0",
    "torch": "2.12.0",
    "prompts": ["a red circle", "a blue square"],
    "recipe": {"name": "rtn-w4a6", "weights": {"num_bits": 4, "group_size": None}},
}


def changed(**changes):
    return {**BEFORE, **changes}


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (BEFORE, []),
        (changed(seed="1", torch="2.13.0"), ["seed 0 → 1", "torch 2.12.0 → 2.13.0"]),
        (changed(prompts=["a red circle"]), ["prompts differ (2 → 1)"]),
        (changed(prompts=["a red circle", "x"]), ["prompts differ (number 2: 'a blue square' → 'x')"]),
        (changed(prompts=None), ["prompts differ"]),
        (
            changed(recipe={"name": "rtn-w4a6", "weights": {"num_bits": 8, "group_size": 64}}),
            ["recipe: weights.group_size None → 64", "recipe: weights.num_bits 4 → 8"],
        ),
        (changed(dtype="two words"), ["dtype None → 'two words'"]),
    ],
)
def test_each_difference_is_named(after, expected):
    assert list(differences(BEFORE, after)) == expected


def test_long_values_are_cut():
    (line,) = differences({"prompts": ["a" * 10**6]}, {"prompts": ["b" * 10**6]})
    assert len(line) < 250
