import pytest

from s2q.core.errors import (
    BusyError,
    InvalidInputError,
    ResourceError,
    S2QError,
    UsageError,
    first_line,
    nearest_names,
    short_repr,
    unknown_name,
)

RECIPES = ("rtn-w8a8", "rtn-w4a8", "rtn-w4a6", "rtn-w4a4", "rtn-w4a16")


def test_exit_codes_are_those_of_the_command_line():
    codes = {S2QError: 1, UsageError: 2, InvalidInputError: 3, ResourceError: 4, BusyError: 5}
    assert {error: error("x").exit_code for error in codes} == codes


@pytest.mark.parametrize("name", ["rtn-w4a7", "RTN-W4A6", "rtn_w4a6", "rtnw4a6"])
def test_misspelt_names_find_their_neighbours(name):
    assert "rtn-w4a6" in nearest_names(name, RECIPES)
    assert len(nearest_names(name, RECIPES)) <= 3


def test_the_nearest_comes_first():
    assert nearest_names("rtn_w8a8", RECIPES)[0] == "rtn-w8a8"


def test_nothing_near_gives_nothing():
    assert nearest_names("zzz", RECIPES) == []
    assert nearest_names("rtn", []) == []


def test_unknown_name_lists_the_nearest_and_all():
    error = unknown_name("recipe", "rtn-w4a7", RECIPES)
    assert isinstance(error, InvalidInputError)
    assert str(error).startswith("unknown recipe 'rtn-w4a7': nearest names are ")
    assert all(name in str(error) for name in RECIPES)
    assert "nearest" not in str(unknown_name("recipe", "zzz", RECIPES))
    assert str(unknown_name("recipe", "x", ())).endswith("all: none")


def test_the_first_line_of_somebody_elses_error():
    assert first_line(ValueError("\nwhat went wrong\nand much more")) == "what went wrong"
    assert first_line(KeyError()) == "KeyError"
    assert first_line(OSError("x" * 300)) == "x" * 200 + "…"


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no")


def nested(levels):
    value = []
    for _ in range(levels):
        value = [value] * 9
    return value


@pytest.mark.parametrize(
    "value",
    ["x" * 10**7, b"x" * 10**7, 10**5000, -(10**20000), nested(12), list(range(10**6)), {i: i for i in range(10**5)}]
    + [Unprintable(), {"a": Unprintable()}, "\n" * 1000, "é\u2028" * 1000, nested(10**3)],
    ids=lambda value: type(value).__name__,
)
def test_short_reprs_are_short_and_one_line(value):
    text = short_repr(value)
    assert 0 < len(text) <= 80
    assert "\n" not in text


def test_short_reprs_of_short_values_are_their_reprs():
    for value in (None, True, 0, -1.5, "a", "it's", [1, "a"], {"a": [1]}, ("x",), {1}):
        assert short_repr(value) == repr(value)


def test_messages_are_bounded():
    for error in (S2QError, UsageError, InvalidInputError, ResourceError, BusyError):
        assert len(str(error("x" * 10**7))) == 4001
        assert str(error("short")) == "short"
    assert len(str(unknown_name("recipe", "x" * 10**7, RECIPES))) < 300
