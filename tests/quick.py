"""Which cases of a parametrized test are among the quick ones: one of each kind. `make test ALL=1` runs all of them."""

import pytest


def slow(*values):
    """A case that is not among the quick ones."""
    return pytest.param(*values, marks=pytest.mark.slow)


def quick(cases, *names):
    """The cases of one argument, slow except those named."""
    return [case if case in names else slow(case) for case in cases]


def quick_if(chosen, cases):
    """Cases of several arguments, slow except those that a function chooses."""
    return [case if chosen(*case) else slow(*case) for case in cases]
