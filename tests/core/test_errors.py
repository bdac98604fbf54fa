import pytest

from s2q.core.errors import (
    BusyError,
    InvalidInputError,
    ResourceError,
    S2QError,
    UsageError,
    first_line,
    nearest_names,
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
